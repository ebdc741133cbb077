"""A frozen linear layer whose weight is kept in 4 bits.

It takes the place of bitsandbytes' Linear4bit, with the same bytes, for three reasons. Its statistics are a parameter,
so that ZeRO-3 shards them with the weight. It saves no dequantized or gathered weight for backward. And it never
repacks its weight in place, as bitsandbytes' forward does on some CPUs, after which no gradient passes through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.ops import nf4
from qlora.ops.lora_linear import lora_linear
from qlora.ops.nf4 import QuantSpec


class Linear4bit(nn.Linear):
    """y = x W^T + b with W frozen in 4 bits.

    Attributes:
        weight: packed W, dtype `spec.storage`, shape (bytes / itemsize, 1); frozen.
        statistics: uint8 (bytes,), the scales of W (layout in `qlora.ops.nf4`); frozen.
        bias: (out_features,) in the dtype of the base, or None; frozen.
        compute_dtype: dtype that W is dequantized to and multiplied in.
        weight_dtype: dtype W had before it was quantized.
    """

    weight: nn.Parameter
    statistics: nn.Parameter
    transposed_in_files = False  # transformers' Conv1D keeps its weight as (in, out)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.compute_dtype, self.weight_dtype = spec, compute_dtype, compute_dtype
        num_elements = in_features * out_features
        packed = torch.empty(spec.packed_shape(num_elements), dtype=spec.storage, device=device)
        statistics = torch.empty(spec.statistics_bytes(num_elements), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.statistics = nn.Parameter(statistics, requires_grad=False)
        empty_bias = torch.empty(out_features, dtype=compute_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty_bias, requires_grad=False) if bias else None)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, spec: QuantSpec) -> Linear4bit:
        """Quantize a weight (out, in) whose dtype becomes the compute dtype."""
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, spec, weight.dtype, device="meta")
        packed, statistics = nf4.quantize(weight.detach(), spec)
        layer.set_packed(packed, statistics, weight.dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @classmethod
    def from_bitsandbytes(cls, linear: Any, compute_dtype: torch.dtype, place: str = "") -> Linear4bit:
        """Take over a bitsandbytes Linear4bit without copying its packed weight. Raises BaseModelError."""
        packed, statistics, spec, (out_features, in_features) = nf4.from_linear4bit(linear, place)
        layer = cls(in_features, out_features, linear.bias is not None, spec, compute_dtype, device="meta")
        layer.set_packed(packed, statistics, linear.weight.quant_state.dtype)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def set_packed(self, packed: Tensor, statistics: Tensor, weight_dtype: torch.dtype) -> None:
        """Give the layer its bytes."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.statistics = nn.Parameter(statistics, requires_grad=False)
        self.weight_dtype = weight_dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in), in the compute dtype unless another is given. Reads the parameters as they are now."""
        shape = (self.out_features, self.in_features)
        return nf4.dequantize(self.weight.data, self.statistics.data, self.spec, shape, dtype or self.compute_dtype)

    def borrow(self) -> Tensor:
        """W (out, in) in the compute dtype, to be done with before this thread dequantizes again."""
        shape = (self.out_features, self.in_features)
        return nf4.dequantize_borrowed(self.weight.data, self.statistics.data, self.spec, shape, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.borrow, self.bias, None, None, 1.0)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        """Move, never cast: packed bytes stored as floats would be converted as if they were numbers."""
        packed = self.weight.data  # a cast puts other data into the same parameter
        super()._apply(fn, recurse)
        if self.weight.dtype != packed.dtype:
            self.weight.data = packed.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        bits = f"{self.spec.quant_type}, block {self.spec.block_size}, double quantization {self.spec.double_quant}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {bits}"
