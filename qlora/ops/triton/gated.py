"""The gated activation on GPUs: forward and backward each in one pass, arithmetic in fp32.

Forward rounds act(gate) to the dtype of the inputs before it is multiplied with up, as transformers does; backward rounds
its results alone. tanh is written as a logistic function: gelu_tanh(x) = x sigmoid(2 z).

Shapes: T tokens, F features. A program takes BLOCK features of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def gated_forward(gate_TF: Tensor, up_TF: Tensor, kind: str) -> Tensor:
    """As `ops.gated.gated_forward`. `kind` is "silu", "gelu" or "gelu_tanh"."""
    gate, up = _rows(gate_TF), _rows(up_TF)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid = (len(gate), triton.cdiv(gate.shape[1], BLOCK))
    _forward[grid](gate, up, y, gate.stride(0), up.stride(0), y.stride(0), gate.shape[1], KIND=kind, BLOCK=BLOCK)
    return y.view(gate_TF.shape)


def gated_backward(
    dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, kind: str, *, reuse_dy: bool = False
) -> tuple[Tensor, Tensor]:
    """As `ops.gated.gated_backward`. With `reuse_dy` dgate lies in dy's memory."""
    dy, gate, up = _rows(dy_TF), _rows(gate_TF), _rows(up_TF)
    # Rows of an expanded gradient share their memory.
    reuse_dy = reuse_dy and dy.dtype == gate.dtype and dy.stride(0) >= dy.shape[1]
    dgate = dy if reuse_dy else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    grid = (len(gate), triton.cdiv(gate.shape[1], BLOCK))
    _backward[grid](
        dy, gate, up, dgate, dup,
        dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0), gate.shape[1],
        KIND=kind, BLOCK=BLOCK,
    )  # fmt: skip
    return dgate.view(gate_TF.shape), dup.view(up_TF.shape)


def _rows(x: Tensor) -> Tensor:
    """(T, F) with features side by side: a view where there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _gate_and_slope(x, KIND: tl.constexpr):
    """g(x) and g'(x) of act(x) = x g(x)."""
    if KIND == "gelu":
        g = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        g = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = g * (1.0 - g) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        g = tl.sigmoid(x)
        slope = g * (1.0 - g)
    return g, slope


@triton.jit
def _forward(gate, up, y, gate_stride, up_stride, y_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(gate + row * gate_stride + at, inside, other=0.0).to(tl.float32)
    g, _ = _gate_and_slope(x, KIND)
    act = (x * g).to(gate.dtype.element_ty).to(tl.float32)
    u = tl.load(up + row * up_stride + at, inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + at, (act * u).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    dy, gate, up, dgate, dup,
    dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, width,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(gate + row * gate_stride + at, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_stride + at, inside, other=0.0).to(tl.float32)  # read before dgate, which may lie there
    g, slope = _gate_and_slope(x, KIND)
    tl.store(dgate + row * dgate_stride + at, (d * u * (g + x * slope)).to(dgate.dtype.element_ty), inside)
    tl.store(dup + row * dup_stride + at, (d * x * g).to(dup.dtype.element_ty), inside)
