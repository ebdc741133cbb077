"""What torch.compile sees of dequantizing: one operation that it does not look into.

Left to itself it traces bitsandbytes' kernels through pointers and thread-local buffers, which it gets wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec


def dequantize(packed: Tensor, statistics: Tensor, spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`nf4.dequantize` inside a compiled graph."""
    return _dequantize_4bit(packed, statistics, spec.quant_type, spec.block_size, spec.double_quant, list(shape), dtype)


@torch.library.custom_op("qlora::dequantize_4bit", mutates_args=())
def _dequantize_4bit(
    packed: Tensor,
    statistics: Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    spec = QuantSpec(quant_type, block_size, double_quant, packed.dtype)
    return nf4.dequantize(packed, statistics, spec, tuple(shape), dtype)


@_dequantize_4bit.register_fake
def _(
    packed: Tensor,
    statistics: Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)
