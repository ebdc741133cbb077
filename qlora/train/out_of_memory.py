"""Memory that runs out while training: how much there was, what was asked for, and the cures, the best first.

Nothing is saved on the way out: a step that ended in the middle has changed nothing on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora.config.rules import global_batch_rows
from qlora.config.schema import JobConfig
from qlora.data.loader import TrainLoader
from qlora.distributed.runtime import Runtime
from qlora.errors import QloraError

GIB = 1 << 30
# What torch says of a CPU's memory has no type of its own.
_OF_A_CPU = re.compile(r"DefaultCPUAllocator: (can't allocate memory: [^.]*|not enough memory: [^.]*)")
_OF_A_GPU = re.compile(r"Tried to allocate ([\d.]+ \w+)")
# Freed and not given back, in pieces that nothing fits into.
_MUCH_IN_PIECES = 0.1


class OutOfMemory(QloraError):
    """A rank has no memory left for what the job asks of it."""

    of_one_rank = True


@contextmanager
def explained(config: JobConfig, runtime: Runtime, doing: str, *, loader: TrainLoader | None = None) -> Iterator[None]:
    """Turn running out of memory into an error with numbers and cures. Rank-local: other ranks do not hear of it here.

    Args:
        doing: what is done inside, as in "in step 7".
        loader: whose global batch is to stay; None is that of the job file.

    Raises:
        OutOfMemory: the GPU's memory or this machine's has run out inside.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        asked = what_was_asked(error)
        if asked is None:
            raise
        global_batch = loader.schedule.global_batch_size if loader else global_batch_rows(config, runtime.world_size)
        numbered = [f"{number}. {cure}" for number, cure in enumerate(cures(config, runtime, global_batch), start=1)]
        on_gpu = runtime.device.type == "cuda"
        raise OutOfMemory(
            f"out of memory {doing}",
            place=f"rank {runtime.rank} of {runtime.world_size}, {runtime.device if on_gpu else 'cpu'}",
            found="; ".join([asked, *memory_facts(runtime.device), _batch(config)]),
            next_step="\n        ".join(["nothing that was saved is lost; what helps, the cheapest first:", *numbered]),
        ) from error


def what_was_asked(error: BaseException) -> str | None:
    """What an error says of the piece of memory that was not there; None where it is about something else."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        asked = _OF_A_GPU.search(text)
        return f"tried to allocate {asked[1]}" if asked else text.partition(". ")[0] or "no memory"
    if isinstance(error, MemoryError):
        return text or "no memory"
    asked = _OF_A_CPU.search(text)
    return asked[1] if asked else None


def memory_facts(device: torch.device) -> list[str]:
    """What a GPU's memory is taken by, in words; nothing for a CPU, whose memory is everybody's."""
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return [
        f"{allocated / GIB:.2f} GiB allocated (at most {torch.cuda.max_memory_allocated(device) / GIB:.2f})",
        f"{(reserved - allocated) / GIB:.2f} GiB kept in pieces for reuse",
        f"{free / GIB:.2f} of {total / GIB:.2f} GiB free",
    ]


def _batch(config: JobConfig) -> str:
    rows = config.train.per_device_train_batch_size
    return f"{rows} {'row' if rows == 1 else 'rows'} of at most {config.data.max_length} tokens a micro-step"


def cures(config: JobConfig, runtime: Runtime, global_batch: int) -> list[str]:
    """What helps this job, in the order of what it costs: first what leaves the result as it is.

    Args:
        global_batch: packs a step, over all ranks.
    """
    train, device = config.train, runtime.device
    found = []
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        if reserved - allocated > _MUCH_IN_PIECES * torch.cuda.mem_get_info(device)[1]:
            found.append("set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment")
    half = train.per_device_train_batch_size // 2
    for rows in range(half, 0, -1):
        if global_batch % (rows * runtime.world_size) == 0:
            found.append(
                f"train.per_device_train_batch_size: {rows} with train.gradient_accumulation_steps: "
                f"{global_batch // (rows * runtime.world_size)}, which is the same batch and resumes"
            )
            break
    # Before more GPUs are taken: it costs time, and leaves the result as it is.
    if train.gradient_checkpointing is not True:
        found.append("train.gradient_checkpointing: true, which computes every layer again; it resumes")
    elif device.type == "cuda" and not train.offload_activations:
        found.append("train.offload_activations: true; it resumes")
    if not runtime.is_sharded:
        found.append("launch with launch/accelerate/zero3.yaml on more ranks, which share the base; it resumes")
    elif device.type == "cuda":
        found.append("launch with more ranks, or with launch/accelerate/zero3_offload.yaml; it resumes")
    # This is another job.
    found.append(f"data.max_length below {config.data.max_length}, as a new run")
    return found
