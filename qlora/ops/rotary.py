"""Rotary position embedding of queries and keys (Su et al. 2021, equation 34), in transformers' half-rotation convention.

With x1 the first half and x2 the second half of the dimensions that are turned, and likewise c1, c2 and s1, s2:

    y1 = x1 c1 - x2 s1        dx1 = dy1 c1 + dy2 s2
    y2 = x2 c2 + x1 s2        dx2 = dy2 c2 - dy1 s1

Both are x c + swap(x) s for a sine with signs, where swap() exchanges the halves. Where both halves of cos and of sin are
the same, as with transformers' own, backward is the rotation by the negative angle. Dimensions behind those that cos has
pass as they are (partial rotary embedding). Nothing is kept between forward and backward but cos and sin, which all layers
share.

Shapes: B rows, H heads, T tokens, d features of a head, r <= d of them turned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.errors import QloraError
from qlora.ops.triton.available import can_use_triton


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions. Rank-local; differentiable in `q` and `k`.

    Args:
        q, k: (B, H, T, d), float; the number of heads may differ. Any strides.
        cos, sin: (B, T, r) or (1, T, r), constants; r even and at most d.

    Returns:
        q and k turned, in the shapes, dtypes and strides of the inputs. transformers rounds three times on the way, this
        twice on CPUs and once in Triton's kernel.

    Raises:
        QloraError: where r is odd or larger than d.
    """
    out: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Queries and keys turned, or with `backward` their gradients turned back, without a graph. Rank-local.

    Arguments as in `apply_rotary`. The inputs are left as they are.
    """
    turned, width = cos.shape[-1], min(q.shape[-1], k.shape[-1])
    if cos.shape != sin.shape or turned % 2 or turned > width:
        raise QloraError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} cannot turn heads of {width} features")
    if can_use_triton(q, k, cos, sin):
        from qlora.ops.triton import rotary as kernels

        return kernels.rotate(q, k, cos, sin, backward=backward)
    sin = _signed(sin, backward).unsqueeze(1)
    cos = cos.unsqueeze(1)
    return _turn(q, cos.to(q.dtype), sin.to(q.dtype)), _turn(k, cos.to(k.dtype), sin.to(k.dtype))


def _signed(sin_BTr: Tensor, backward: bool) -> Tensor:
    """What the swapped halves are multiplied with: (-s1, s2), in backward (s2, -s1)."""
    first, second = sin_BTr.chunk(2, -1)
    return torch.cat((second, -first) if backward else (-first, second), -1)


def _turn(x_BHTd: Tensor, cos_B1Tr: Tensor, sin_B1Tr: Tensor) -> Tensor:
    """x c + swap(x) s. Two copies of halves and two passes over whole rows: on CPUs torch is slow where it computes on runs
    as short as half a head, but not where it copies them."""
    width, half = cos_B1Tr.shape[-1], cos_B1Tr.shape[-1] // 2
    y_BHTd = torch.empty_like(x_BHTd)
    y_BHTd[..., :half] = x_BHTd[..., half:width]
    y_BHTd[..., half:width] = x_BHTd[..., :half]
    y_BHTd[..., :width].mul_(sin_B1Tr).addcmul_(x_BHTd[..., :width], cos_B1Tr)
    if width < x_BHTd.shape[-1]:
        y_BHTd[..., width:] = x_BHTd[..., width:]
    return y_BHTd


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotate(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *rotate(grads[0], grads[1], cos, sin, backward=True), None, None
