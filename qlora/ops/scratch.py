"""Work space for operations that go through a tensor in blocks of rows: one buffer a thread, kept from call to call.

A tensor in half precision is normalised, gated or rotated in fp32. Widened whole, it goes through memory once for every step
of the arithmetic, and each fresh tensor of that size is made of fresh pages, which cost more than the arithmetic does. A
block that stays in the cache costs neither. On devices other than CPUs a block is the whole tensor, its buffer a fresh one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block: small enough for the cache to hold a few fp32 buffers of them, large enough for the time that an
# operation takes to start not to count.
BLOCK_ELEMENTS = 1 << 19

_kept = threading.local()


def row_blocks(num_rows: int, row_elements: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `num_rows` rows, each as many as a block holds and at least one. All rows at once off the CPU."""
    whole = device.type != "cpu" or torch.compiler.is_compiling()
    step = max(1, num_rows if whole else BLOCK_ELEMENTS // max(1, row_elements))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def buffers(count: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """`count` tensors of this shape that share no memory, with anything in them. Rank-local.

    On a CPU they are this thread's own and hold until its next call, so nobody may keep one.
    """
    rows, columns = shape
    if device.type != "cpu" or torch.compiler.is_compiling():
        return tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(count))
    needed = count * rows * columns
    kept: Tensor | None = getattr(_kept, "buffer", None)
    if kept is None or kept.numel() < needed * dtype.itemsize:
        kept = _kept.buffer = torch.empty(needed * dtype.itemsize, dtype=torch.uint8)
    return tuple(kept[: needed * dtype.itemsize].view(dtype).view(count, rows, columns).unbind())
