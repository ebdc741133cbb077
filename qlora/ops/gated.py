"""The gated activation of a transformer's MLP (Shazeer 2020): y = act(gate) up, forward and backward.

Between forward and backward gate and up are kept and nothing else: y, which the down projection eats, is made again from
them in one pass by whoever needs it. On CPUs, where the exponential is what costs, act(gate) is then handed on to the
backward pass of the product, which comes next.

Shapes: T tokens, F features of the MLP.

    y_TF     = round(act(gate)) up
    dup_TF   = dy round(act(gate))
    dgate_TF = round(dy up) act'(gate)

round() goes to the dtype of the inputs, as transformers does by taking one operation after the other. Forward is equal to
its own bit for bit on CPUs where it uses torch's activations ("silu", "gelu", "gelu_pytorch_tanh"); the functions that it
spells out ("gelu_new", ...) are computed here with fewer roundings. On CPUs whole tensors are gone through, and not blocks
that stay in the cache: the exponential costs more than memory does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.errors import QloraError
from qlora.ops import remake
from qlora.ops.triton.available import can_use_triton

# transformers' names (ACT2FN) for the three kinds. Those that stand for another function are not among them.
KINDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}


def kind_of(hidden_act: str) -> str | None:
    """The kind ("silu", "gelu", "gelu_tanh") that transformers calls `hidden_act`, or None where it is none of them."""
    return KINDS.get(hidden_act)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up. Rank-local; differentiable in both.

    Args:
        gate, up: (..., F), the same float dtype.
        kind: "silu", "gelu" or "gelu_tanh", or one of transformers' names for them.

    Returns:
        (..., F) in the inputs' dtype. Saves gate and up, and neither copies.

    Raises:
        QloraError: for another kind.
    """
    kind = _known(kind)
    if torch.compiler.is_compiling():  # it decides by itself what is made again
        y: Tensor = _Gated.apply(gate, up, kind, None)
        return y
    # Where neither needs a gradient no backward pass would take it.
    made = _Made() if gate.requires_grad or up.requires_grad else None
    y = _Gated.apply(gate, up, kind, made)
    remake.offer(y, (gate, up), lambda gate, up: gated_forward(gate, up, kind, made=made))
    return y


class _Made:
    """act(gate), from where the product is made again in backward to the backward pass of the product, a moment later."""

    act_TF: Tensor | None = None

    def take(self) -> Tensor | None:
        act_TF, self.act_TF = self.act_TF, None
        return act_TF


def gated_forward(gate_TF: Tensor, up_TF: Tensor, kind: str, *, made: _Made | None = None) -> Tensor:
    """act(gate) * up (T, F), without a graph. Rank-local. Arguments as in `gated_activation`.

    Args:
        made: where to put act(gate), where it is made as a tensor of its own.
    """
    kind = _known(kind)
    if can_use_triton(gate_TF, up_TF):
        from qlora.ops.triton import gated as kernels

        return kernels.gated_forward(gate_TF, up_TF, kind)
    if made is None:
        return _activate(gate_TF, kind).mul_(up_TF)
    made.act_TF = _activate(gate_TF, kind)
    return made.act_TF * up_TF


def gated_backward(
    dy_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    kind: str,
    *,
    reuse_dy: bool = False,
    act_TF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_forward`. Rank-local.

    Args:
        dy_TF: gradient of y, in the dtype of the inputs.
        reuse_dy: one of the results may lie in dy's memory, which is then used up.
        act_TF: act(gate) where it is there already; used up.

    Returns:
        dgate (T, F), dup (T, F), in the inputs' dtype.
    """
    kind = _known(kind)
    if can_use_triton(dy_TF, gate_TF, up_TF):
        from qlora.ops.triton import gated as kernels

        return kernels.gated_backward(dy_TF, gate_TF, up_TF, kind, reuse_dy=reuse_dy)
    dup_TF = (_activate(gate_TF, kind) if act_TF is None else act_TF).mul_(dy_TF)
    dact_TF = dy_TF.mul_(up_TF) if reuse_dy else dy_TF * up_TF
    if kind == "silu":
        return torch.ops.aten.silu_backward(dact_TF, gate_TF), dup_TF
    approximate = "none" if kind == "gelu" else "tanh"
    return torch.ops.aten.gelu_backward(dact_TF, gate_TF, approximate=approximate), dup_TF


def _known(kind: str) -> str:
    known = KINDS.get(kind)
    if known is None:
        raise QloraError(
            f"{kind!r} is not a gated activation that is computed here",
            next_step=f"use one of {', '.join(sorted(KINDS))}",
        )
    return known


def _activate(gate_TF: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(gate_TF)
    return torch.nn.functional.gelu(gate_TF, approximate="none" if kind == "gelu" else "tanh")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, made: _Made | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.made = kind, made
        return gated_forward(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        act = None if ctx.made is None else ctx.made.take()
        return *gated_backward(grads[0], gate, up, ctx.kind, act_TF=act), None, None
