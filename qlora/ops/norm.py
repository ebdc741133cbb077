"""Root mean square norm (Zhang and Sennrich 2019, equation 4): y = x / sqrt(mean(x^2) + eps) * w, forward and backward.

Between forward and backward only the input and one number a row, rstd = 1 / sqrt(mean(x^2) + eps), are kept; from these the
output is made again in one pass, bit for bit, for whoever would otherwise keep it.

Two conventions are found in transformers, which differ in what is rounded. Both are met bit for bit on CPUs:

    early (Llama, Qwen, Mistral):  y = w * round(x rstd)              round() goes to the dtype of x; the product is w's
    late (Gemma):                  y = round((offset + w) * x rstd)   all in fp32, rounded once

Shapes: T rows, D features.

    g_TD  = dy (offset + w)
    dx_TD = rstd g - x rstd^3 mean_D(g x)
    dw_D  = sum_T dy x rstd

All is computed in fp32, or in float64 where the input is. Backward takes roundings for the identity, and rounds once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops import remake
from qlora.ops.scratch import buffers, row_blocks
from qlora.ops.triton.available import can_use_triton

# Features of a row that a program of Triton's can hold in registers.
MAX_WIDTH = 1 << 14


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, offset: float = 0.0, late_rounding: bool = False) -> Tensor:
    """Root mean square norm over the last dimension. Rank-local; differentiable in `x` and `weight_D`.

    Args:
        x: (..., D), float.
        weight_D: (D,), float.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for Gemma.
        late_rounding: Gemma's convention (True) or Llama's (False), see the module.

    Returns:
        (..., D); late: in the dtype of x, early: in what the dtypes of x and the weight promote to, as in transformers.
        Saves x and one number a row.
    """
    x_TD = x.reshape(-1, x.shape[-1])
    y_TD, rstd_T = _RmsNorm.apply(x_TD, weight_D, eps, offset, late_rounding)
    if torch.compiler.is_compiling():  # it decides by itself what is made again
        return y_TD.reshape(x.shape)
    # What the weight is now: ZeRO-3 may have taken it back before the output is made again. Its own memory alone is kept.
    weight_now_D = weight_D.detach()
    if weight_now_D.untyped_storage().nbytes() > weight_now_D.nbytes:
        weight_now_D = weight_now_D.clone()
    remake.offer(
        y_TD,
        (x_TD, rstd_T),
        lambda x, rstd: rms_norm_again(x, rstd, weight_now_D, offset=offset, late_rounding=late_rounding),
    )
    return y_TD.reshape(x.shape)


def rms_norm_forward(
    x_TD: Tensor, weight_D: Tensor, eps: float, *, offset: float, late_rounding: bool
) -> tuple[Tensor, Tensor]:
    """The norm of each row, without a graph. Rank-local. Arguments as in `rms_norm`.

    Returns:
        y (T, D), dtype as in `rms_norm`; rstd (T,), fp32 (float64 where x is).
    """
    if _can_use_triton(x_TD, weight_D):
        from qlora.ops.triton import norm as kernels

        return kernels.rms_norm_forward(x_TD, weight_D, eps, offset=offset, late_rounding=late_rounding)
    rstd_T = torch.empty(len(x_TD), dtype=_wide(x_TD), device=x_TD.device)
    return _normalise(x_TD, rstd_T, weight_D, eps, offset, late_rounding), rstd_T


def rms_norm_again(x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor, *, offset: float, late_rounding: bool) -> Tensor:
    """The output of `rms_norm_forward` (T, D) once more, bit for bit, from its input and its rstd. Rank-local."""
    if _can_use_triton(x_TD, weight_D):
        from qlora.ops.triton import norm as kernels

        return kernels.rms_norm_again(x_TD, rstd_T, weight_D, offset=offset, late_rounding=late_rounding)
    return _normalise(x_TD, rstd_T, weight_D, None, offset, late_rounding)


def rms_norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    offset: float,
    late_rounding: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `rms_norm_forward`. Rank-local.

    Args:
        dy_TD: gradient of y, any float dtype.
        rstd_T: what the forward returned.
        need_weight: whether the weight's gradient is wanted.

    Returns:
        dx (T, D) in the dtype of x; dw (D,) in the dtype of the weight, or None.
    """
    if _can_use_triton(x_TD, weight_D, dy_TD):
        from qlora.ops.triton import norm as kernels

        return kernels.rms_norm_backward(
            dy_TD, x_TD, weight_D, rstd_T, offset=offset, late_rounding=late_rounding, need_weight=need_weight
        )
    num_rows, width = x_TD.shape
    wide, device = _wide(x_TD), x_TD.device
    scale_D = _scale(weight_D, wide, offset, late_rounding)
    dx_TD = torch.empty(num_rows, width, dtype=x_TD.dtype, device=device)
    dw_D = torch.zeros(width, dtype=wide, device=device) if need_weight else None
    work: tuple[Tensor, ...] = ()
    for rows in row_blocks(num_rows, width, device):
        count = rows.stop - rows.start
        work = work or buffers(3, (count, width), wide, device)
        room, g, product = (buffer[:count] for buffer in work)
        rstd = rstd_T[rows, None]
        x = _widened(x_TD[rows], room)
        g.copy_(dy_TD[rows])
        if dw_D is not None:
            torch.mul(g, x, out=product)
            dw_D += product.mul_(rstd).sum(0)
        g.mul_(scale_D)
        torch.mul(g, x, out=product)
        factor = product.mean(-1, keepdim=True).mul_(rstd).mul_(rstd).mul_(rstd)
        g.mul_(rstd).addcmul_(x, factor, value=-1)
        dx_TD[rows].copy_(g)
    return dx_TD, None if dw_D is None else dw_D.to(weight_D.dtype)


def _normalise(
    x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor, eps: float | None, offset: float, late_rounding: bool
) -> Tensor:
    """y (T, D). With `eps` rstd_T is filled first."""
    num_rows, width = x_TD.shape
    wide, device = _wide(x_TD), x_TD.device
    scale_D = _scale(weight_D, wide, offset, late_rounding)
    y_dtype = x_TD.dtype if late_rounding else torch.promote_types(x_TD.dtype, weight_D.dtype)
    y_TD = torch.empty(num_rows, width, dtype=y_dtype, device=device)
    work: tuple[Tensor, ...] = ()
    for rows in row_blocks(num_rows, width, device):
        count = rows.stop - rows.start
        work = work or buffers(2, (count, width), wide, device)
        room, normal = (buffer[:count] for buffer in work)
        rstd, y = rstd_T[rows], y_TD[rows]
        x = _widened(x_TD[rows], room)
        normal = y if y_dtype == wide else normal
        if eps is not None:
            torch.mul(x, x, out=normal)
            torch.mean(normal, -1, out=rstd)
            rstd.add_(eps).rsqrt_()
        torch.mul(x, rstd[:, None], out=normal)
        if late_rounding:
            y.copy_(normal.mul_(scale_D))
        elif y_dtype == x_TD.dtype:
            y.copy_(normal)
            y.mul_(scale_D)
        else:  # a weight wider than x: rounded to the dtype of x all the same
            torch.mul(normal.to(x_TD.dtype), scale_D, out=y)
    return y_TD


def _can_use_triton(x_TD: Tensor, *others: Tensor) -> bool:
    return x_TD.shape[1] <= MAX_WIDTH and can_use_triton(x_TD, *others)


def _widened(x: Tensor, room: Tensor) -> Tensor:
    """x in the dtype of `room`, and there unless it is in that dtype already."""
    return x if x.dtype == room.dtype else room.copy_(x)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scale(weight_D: Tensor, wide: torch.dtype, offset: float, late_rounding: bool) -> Tensor:
    """offset + w, in the wide dtype where rounding is late, else in the weight's own."""
    scale_D = weight_D.detach()
    if late_rounding:
        scale_D = scale_D.to(wide)
    return scale_D + offset if offset else scale_D


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float, late_rounding: bool
    ) -> tuple[Tensor, Tensor]:
        y_TD, rstd_T = rms_norm_forward(x_TD, weight_D, eps, offset=offset, late_rounding=late_rounding)
        ctx.save_for_backward(x_TD, rstd_T)
        # The parameter itself, not a saved tensor: ZeRO-3 may have partitioned it when recomputation compares shapes.
        ctx.weight, ctx.offset, ctx.late_rounding = weight_D, offset, late_rounding
        ctx.mark_non_differentiable(rstd_T)
        return y_TD, rstd_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, rstd_T = ctx.saved_tensors
        dx_TD, dw_D = rms_norm_backward(
            grads[0],
            x_TD,
            ctx.weight,
            rstd_T,
            offset=ctx.offset,
            late_rounding=ctx.late_rounding,
            need_weight=ctx.needs_input_grad[1],
        )
        return dx_TD, dw_D, None, None, None
