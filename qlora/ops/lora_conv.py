"""A convolution with a low-rank update as one autograd function: y = W * x + b + s (B * (A * dropout(x)) + c).

With a magnitude m it is DoRA (Liu et al. 2024, equations 5 and 11), with V = W + s B A and the norm |V| of each output
channel held constant: y = (m / |V|) (W * x + s B * (A * dropout(x))) + b.

W is frozen and asked for when it is needed, in forward and again in backward; what stays alive in between is the input.
What B and A do is computed again in backward: it is a small part of the whole. B has a kernel of one point, so that B and
A together are one kernel of the base's size.

Shapes: N batch, I input channels, O output channels, K kernel (one or two dimensions), R the rank, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops.dropout import dropout_mask


@dataclass(frozen=True)
class Geometry:
    """How a kernel is laid over its input, one number a dimension; the input is padded before, where that takes more."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """weight * x, without bias."""
        return torch.convolution(
            x, weight, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), groups
        )

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The gradient of x."""
        made = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), groups,
            [True, False, False],
        )  # fmt: skip
        return made[0]


def lora_conv(
    x: Tensor,
    read_weight: Callable[[], Tensor],
    bias_O: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    geometry: Geometry,
    groups: int,
    lora_bias_O: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Apply a frozen convolution and, where A and B are given, its low-rank update. Rank-local.

    Args:
        x: (N, I, ...), padded where the geometry does not say so, float.
        read_weight: returns W (O, I / G, K) in the dtype to compute in, anew each time.
        bias_O: frozen bias or None.
        lora_A, lora_B: (R, I, K) and (O, R / G, 1...), trainable; None for the frozen convolution alone.
        lora_bias_O: c, the bias of B, or None; not together with a magnitude.
        magnitude: m (1, O, 1...), or None for plain LoRA; for one group alone.

    Returns:
        (N, O, ...) in the dtype of x. Gradients of A, B, c and m come in the dtypes of these.
    """
    seed = int(torch.randint(0, 2**62, ())) if dropout > 0 and lora_A is not None else 0
    return _LoraConv.apply(
        x, lora_A, lora_B, lora_bias_O, magnitude, read_weight, bias_O, scaling, dropout, seed, geometry, groups
    )


def kernel_of(lora_A: Tensor, lora_B: Tensor, groups: int) -> Tensor:
    """B A as one kernel (O, I, K) over all input channels: of each group, its outputs through its own part of A."""
    A_GRF = lora_A.reshape(groups, lora_A.shape[0] // groups, -1)
    B_GOR = lora_B.reshape(groups, lora_B.shape[0] // groups, -1)
    return (B_GOR @ A_GRF).reshape(lora_B.shape[0], *lora_A.shape[1:])


def channel_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """|W + s B A| of each output channel (1, O, 1...), fp32 or wider, without a graph; for one group.

    A channel of zeros has the smallest positive number for a norm, as in `ops.lora_linear.row_norms`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    V = weight.detach().to(wide) + scaling * kernel_of(lora_A.detach().to(wide), lora_B.detach().to(wide), 1)
    norms = torch.linalg.vector_norm(V.flatten(1), dim=1).clamp_(min=torch.finfo(wide).tiny)
    return norms.reshape(1, -1, *[1] * (weight.ndim - 2))


class _LoraConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        lora_bias_O: Tensor | None,
        magnitude: Tensor | None,
        read_weight: Callable[[], Tensor],
        bias_O: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
        geometry: Geometry,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Parameters as themselves, not as saved tensors: see `ops.lora_linear`.
        ctx.trained = (lora_A, lora_B, lora_bias_O, magnitude)
        ctx.read_weight, ctx.geometry, ctx.groups = read_weight, geometry, groups
        ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
        weight = read_weight()
        dtype = weight.dtype
        y = geometry.convolve(x.to(dtype), weight, groups)
        if lora_A is not None and lora_B is not None:
            y = y + _low_rank(x.to(dtype), lora_A, lora_B, lora_bias_O, ctx)
            if magnitude is not None:
                ctx.norms = channel_norms(weight, lora_A, lora_B, scaling)
                y = y * (magnitude / ctx.norms).to(dtype)
        if bias_O is not None:
            y = y + bias_O.to(dtype).reshape(1, -1, *[1] * (y.ndim - 2))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        need_x, *needs = ctx.needs_input_grad[:5]
        magnitude = ctx.trained[3]
        weight = ctx.read_weight() if need_x or needs[3] else None
        dtype = weight.dtype if weight is not None else grads[0].dtype
        dy = grads[0].to(dtype)
        dz = dy if magnitude is None else dy * (magnitude / ctx.norms).to(dtype)
        grad_x = ctx.geometry.input_gradient(dz, x.to(dtype), weight, ctx.groups) if need_x else None
        gradients: list[Tensor | None] = [None] * 4
        if ctx.trained[0] is not None:
            with torch.enable_grad():
                own_x = x.detach().to(dtype).requires_grad_(need_x)
                own = [
                    None if p is None else p.detach().requires_grad_(n) for p, n in zip(ctx.trained[:3], needs, strict=False)
                ]
                low = _low_rank(own_x, own[0], own[1], own[2], ctx)
            wanted = [t for t in (own_x, *own) if t is not None and t.requires_grad]
            made = iter(torch.autograd.grad(low, wanted, dz) if wanted else ())
            if grad_x is not None:
                grad_x = grad_x + next(made)
            gradients[:3] = [next(made) if t is not None and t.requires_grad else None for t in own]
            if needs[3] and weight is not None:
                z = ctx.geometry.convolve(x.to(dtype), weight, ctx.groups) + low.detach()
                wide = ctx.norms.dtype
                product = (dy.to(wide) * z.to(wide)).sum(dim=[0, *range(2, z.ndim)], keepdim=True)
                gradients[3] = (product / ctx.norms).to(magnitude.dtype)
        return None if grad_x is None else grad_x.to(x.dtype), *gradients, *[None] * 7


def _low_rank(x: Tensor, lora_A: Any, lora_B: Any, lora_bias_O: Tensor | None, ctx: Any) -> Tensor:
    """s (B * (A * dropout(x)) + c)."""
    dropped = x * dropout_mask(x, ctx.dropout, ctx.seed) if ctx.dropout > 0 else x
    h = ctx.geometry.convolve(dropped, lora_A.to(x.dtype), 1)
    bias = None if lora_bias_O is None else lora_bias_O.to(x.dtype)
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    out = torch.convolution(h, lora_B.to(x.dtype), bias, ones, zeros, ones, False, zeros, ctx.groups)
    return out * ctx.scaling
