"""Which of DeepSpeed's offload settings a QLoRA job can use, and why not the others. Torch-free, DeepSpeed-free.

What is worth moving off a GPU is the frozen base. 70B weights are 39 GB in 4 bits, cut by N ranks under ZeRO-3; with r = 16
on all linear layers they have 0.2B trained parameters, and a master copy, AdamW's two moments and the gradients of those are
16 bytes each, 3.3 GB, cut by N as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora.errors import LaunchError

PLACE = "DeepSpeed JSON"
PARAM, OPTIMIZER = "zero_optimization.offload_param", "zero_optimization.offload_optimizer"


def refuse_bad_offload(config: dict[str, Any], optimizer: str) -> None:
    """Refuse what DeepSpeed would ignore, cannot do with these parameters, or do for nothing. Rank-local.

    Args:
        config: the DeepSpeed JSON.
        optimizer: `train.optimizer`.

    Raises:
        LaunchError: the first setting that cannot be used, and what to write instead.
    """
    zero = config["zero_optimization"]
    stage = int(zero["stage"])
    param, state = device_of(zero, "offload_param"), device_of(zero, "offload_optimizer")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.get(old):
            raise _refusal(f"{old} is DeepSpeed's former name for it", old, f'say "{new}": {{"device": "cpu"}}')
    if param != "none" and stage < 3:
        # DeepSpeed 0.19.8 ignores it without a word.
        raise _refusal("parameters can be offloaded at stage 3 alone", PARAM, "take launch/accelerate/zero3_offload.yaml")
    if param == "nvme":
        _check_disk(zero["offload_param"])
    if zero.get("zenflow"):
        raise _refusal("zenflow updates with gradients of former steps", "zero_optimization.zenflow", "remove it")
    if state == "none":
        return
    if state == "nvme":
        # A resume would have to set what DeepSpeed 0.19.8 holds in files alone.
        raise _refusal("such a run could not be resumed, and the state is small", f"{OPTIMIZER}.device", "say cpu, or none")
    if optimizer != "adamw":
        raise LaunchError(
            f"{optimizer} computes on a GPU, where its offloaded state is not",
            place="train.optimizer",
            found=f"{OPTIMIZER}.device is {state}",
            wanted="adamw",
        )
    if config.get("zero_force_ds_cpu_optimizer", True):
        raise _refusal("DeepSpeed would compile an AdamW of its own", "zero_force_ds_cpu_optimizer", "say false")
    if zero["offload_optimizer"].get("super_offload") or float(zero["offload_optimizer"].get("ratio", 1)) != 1:
        raise _refusal("ratio and super_offload need the AdamW that DeepSpeed compiles", OPTIMIZER, "remove them")


def device_of(zero: dict[str, Any], key: str) -> str:
    """none, cpu or nvme."""
    return str((zero.get(key) or {}).get("device", "none"))


def take_share_folder(zero: dict[str, Any]) -> Path | None:
    """Where a base on a disk lies; None where it is in memory. DeepSpeed is told that it is in memory. Rank-local."""
    if device_of(zero, "offload_param") != "nvme":
        return None
    folder = Path(zero["offload_param"]["nvme_path"])
    zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return folder


def _check_disk(offload: dict[str, Any]) -> None:
    if not offload.get("nvme_path"):
        raise _refusal("a base on a disk needs a folder there", f"{PARAM}.nvme_path", "name a folder of a local disk")
    if unused := sorted(set(offload) - {"device", "nvme_path"}):
        raise _refusal(f"{', '.join(unused)} mean nothing for a base that is mapped from files", PARAM, "remove them")


def _refusal(message: str, place: str, next_step: str) -> LaunchError:
    return LaunchError(message, place=f"{PLACE}: {place}", next_step=next_step)
