"""The memory that is left for activations: what is free once the base is loaded, less what training takes by itself."""

from __future__ import annotations

from typing import Any

import torch

from qlora.distributed.gathers import gathers, num_bytes, prefetched_elements
from qlora.distributed.runtime import Runtime
from qlora.lora.kinds import WRAPPERS
from qlora.objective.train_model import LossHead, TrainModel
from qlora.plan.activations import NCCL_BYTES, USABLE
from qlora.quant.linear import QuantizedLinear
from qlora.quant.room import free_bytes


def room_for_activations(train_model: TrainModel, runtime: Runtime) -> int | None:
    """Bytes that activations may take on this rank; None where free memory cannot be known. Rank-local.

    On a CPU it is this rank's part of what the machine, or the group of processes that it is in, has left.
    """
    free = free_bytes(runtime.device)
    if free is None:
        return None
    if runtime.device.type == "cuda":  # what the allocator holds and has not given out
        free += torch.cuda.memory_reserved(runtime.device) - torch.cuda.memory_allocated(runtime.device)
    return int(free * USABLE) - training_bytes(train_model, runtime)


def training_bytes(train_model: TrainModel, runtime: Runtime) -> int:
    """Bytes that training will take on this rank besides activations and what was loaded, at most."""
    trained = [p for p in train_model.parameters() if p.requires_grad]
    count = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    # Gradients, two moments and an fp32 copy, in fp32; of bfloat16 adapters without DeepSpeed all of it as well.
    state = 16 * count
    if runtime.is_zero:
        shares = runtime.world_size
        state = 16 * -(-count // shares) if runtime.is_sharded else 4 * count + 12 * -(-count // shares)
        state += 4 * int(_zero_settings(runtime).get("reduce_bucket_size", 0))
    elif runtime.world_size > 1:
        state += 4 * count  # the buckets of DDP
    if runtime.is_sharded:
        state += _gathered_bytes(train_model, runtime) + 4 * count  # A and B are kept whole as well
    quantized = [m for m in train_model.modules() if isinstance(m, QuantizedLinear)]
    weight = max((m.in_features * m.out_features for m in quantized), default=0)
    itemsize = train_model.model.get_input_embeddings().weight.element_size()
    nccl = NCCL_BYTES if runtime.device.type == "cuda" and runtime.world_size > 1 else 0
    return state + weight * itemsize + nccl


def _zero_settings(runtime: Runtime) -> dict[str, Any]:
    settings: dict[str, Any] = runtime.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return settings


def _gathered_bytes(train_model: TrainModel, runtime: Runtime) -> int:
    """Of parameters that are gathered at one time under ZeRO-3, and the copy that unpacking makes, at most."""
    leaves = (*WRAPPERS, LossHead)
    largest = max(num_bytes(together) for together in gathers(train_model, leaves))
    # A packed weight's element is a byte, and most of what is gathered ahead is packed.
    ahead = int(_zero_settings(runtime).get("stage3_prefetch_bucket_size", 0))
    if not runtime.accelerator.state.deepspeed_plugin.states_prefetch:
        ahead = prefetched_elements(train_model, leaves, ahead)
    return 2 * min(largest + ahead, num_bytes(train_model.parameters()))
