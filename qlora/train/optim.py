"""The optimizer over what trains, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from qlora.config.schema import TrainConfig
from qlora.errors import ConfigError


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: TrainConfig,
    device: torch.device,
    *,
    sharded: bool,
    lora_B: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters: torch's, or bitsandbytes' 8-bit and paged ones on a GPU.

    Args:
        lora_B: which of the parameters are a B. Where the job asks for LoRA+, they are a group of their own whose `lr_ratio`
            the engine multiplies with each step's learning rate (Hayou et al. 2024, whose lambda it is).
        sharded: DeepSpeed will cut up the state (it then needs torch's own).

    Raises:
        ConfigError: an optimizer that needs a GPU, or that DeepSpeed cannot shard, or a ratio where there is no B.
    """
    groups = _groups(list(parameters), config, lora_B)
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        # One kernel over all of the many small tensors; on CPUs it takes a tenth of the plain one's time.
        return torch.optim.AdamW(groups, **arguments, fused=True)
    if device.type != "cuda" or sharded:
        raise ConfigError(
            f"{config.optimizer} needs a GPU and an optimizer state that is not sharded",
            place="train.optimizer",
            found="ZeRO" if sharded else "no GPU",
            wanted="adamw",
        )
    from qlora.ops.nf4 import bitsandbytes_optimizer

    return bitsandbytes_optimizer(config.optimizer)(groups, **arguments)


def _groups(parameters: list[nn.Parameter], config: TrainConfig, lora_B: Collection[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters by learning rate."""
    ratio, second = config.loraplus_lr_ratio, {id(p) for p in lora_B}
    if ratio is None:
        return [{"params": parameters}]
    if not second:
        raise ConfigError(
            "nothing that trains is the B of an update",
            place="train.loraplus_lr_ratio",
            found=ratio,
            next_step="set it to null",
        )
    first = {"params": [p for p in parameters if id(p) not in second]}
    return [
        first,
        {"params": [p for p in parameters if id(p) in second], "lr": config.learning_rate * ratio, "lr_ratio": ratio},
    ]


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Steps over which the learning rate rises."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * num_steps)


def learning_rate_at(step: int, config: TrainConfig, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `num_steps`.

    It rises linearly to `learning_rate` and then falls by a straight line or half a cosine, reaching zero one step after
    the last, or stays. It depends on the step alone, so that nothing has to be saved for it.
    """
    warmup = num_warmup_steps(config, num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1.0 - progress)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
