"""The pieces a run and a dry run are both made of: the base with its LoRA layers, the prepared engine, memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from qlora.adapter.base import load_base
from qlora.config.schema import JobConfig
from qlora.data.sampler import Split
from qlora.distributed import runtime as processes
from qlora.distributed.engine import Engine
from qlora.distributed.runtime import Runtime
from qlora.errors import ConfigError
from qlora.lora.inject import inject_lora
from qlora.lora.kinds import WRAPPERS
from qlora.lora.layer import trained_B
from qlora.lora.report import LoraReport
from qlora.objective.train_model import LossHead, TrainModel
from qlora.train.optim import build_optimizer
from qlora.train.recompute import recompute


def check_device(config: JobConfig, runtime: Runtime) -> None:
    """Refuse dtypes that the device or the sharding cannot train in."""
    if config.model.dtype == "float16" and (runtime.device.type != "cuda" or runtime.is_zero):
        raise ConfigError(
            "float16 needs a GPU and its loss scale, which is not applied under DeepSpeed",
            place="model.dtype",
            found=f"{runtime.device.type}, {runtime.mode}",
            wanted="bfloat16 or float32",
        )


def build_model(
    config: JobConfig, runtime: Runtime, *, force: bool = False, resumed: Path | None = None, tokenizer: Any = None
) -> tuple[Any, TrainModel, LoraReport]:
    """The base with its LoRA layers, and the module that is to be prepared. Collective.

    Args:
        force: load a base that the free memory does not seem to hold.
        resumed: the checkpoint that is gone on from, whose base is rebuilt where its start changed the base.
        tokenizer: the base's, where it is open already.
    """
    model, _ = load_base(
        config.model.base,
        revision=config.model.revision,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=runtime.device,
        attention="auto" if config.model.attention in ("auto", "documents") else config.model.attention,
        allow_pickle=config.model.allow_pickle,
        sharding=runtime.sharding(),
        check_room=not force,
        lora=config.lora,
        seed=config.train.seed,
        adapter=resumed,
        # Tokens are added to one as it came.
        tokenizer=None if config.lora.new_tokens or resumed is not None else tokenizer,
    )
    if config.data.chat_template is not None:
        model.qlora_chat_template = Path(config.data.chat_template).read_text(encoding="utf-8")
    report = inject_lora(model, config.lora, seed=config.train.seed)
    train_model = TrainModel(model, config.model.attention, z_loss=config.train.z_loss).train()
    model.qlora_recomputed = recompute(config, runtime, train_model)
    return model, train_model, report


def prepare_engine(config: JobConfig, runtime: Runtime, train_model: TrainModel) -> Engine:
    """Hand the module to Accelerate and DeepSpeed. Collective.

    Raises:
        ConfigError: rows are to be packed, and this model would let their documents see each other; or what trains has
            several dtypes under ZeRO-3.
    """
    parameters = [p for p in train_model.parameters() if p.requires_grad]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    if runtime.is_sharded and len(dtypes) > 1:
        raise ConfigError(
            "DeepSpeed's ZeRO-3 keeps all that trains in one dtype",  # 0.19.8 lays the shares into one buffer
            place="lora.dtype",
            found=f"{' and '.join(dtypes)}: magnitudes and modules trained as wholes are float32",
            next_step="set lora.dtype to float32, or launch with zero2.yaml",
        )
    optimizer = build_optimizer(
        parameters,
        config.train,
        runtime.device,
        sharded=runtime.is_zero,
        lora_B=trained_B(train_model),
    )
    engine = processes.prepare(
        runtime,
        train_model,
        optimizer,
        max_grad_norm=config.train.max_grad_norm,
        scale_loss=config.model.dtype == "float16",
        leaves=(*WRAPPERS, LossHead),
    )
    with engine.micro_step(last=False):
        train_model.settle()
    if config.data.packing and train_model.packing_refused is not None:
        raise train_model.packing_refused
    return engine


def split_of(config: JobConfig, runtime: Runtime, global_batch_size: int | None = None) -> Split:
    """How a global batch is shared out over these ranks.

    Args:
        global_batch_size: one that is kept, in packs, whatever the job file's numbers make with these ranks. They are used
            as they are where they make it; otherwise no rank gets more packs at once than they say.
    """
    size, steps = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    split = Split(runtime.world_size, size, steps)
    if global_batch_size is None or global_batch_size == split.global_batch_size:
        return split
    return Split.keeping(global_batch_size, runtime.world_size, size)


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: of the GPU's memory, or resident where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count what the launcher held when it forked this process.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
