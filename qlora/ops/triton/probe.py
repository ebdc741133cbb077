"""The smallest kernel there is, by which one learns whether Triton works."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _double(x, y, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < count
    tl.store(y + at, 2 * tl.load(x + at, inside), inside)


def doubled(x: Tensor) -> Tensor:
    """2 x, for x of at most 64 elements. Rank-local."""
    y = torch.empty_like(x)
    _double[(1,)](x, y, x.numel(), BLOCK=64)
    return y
