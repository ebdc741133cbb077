"""Frozen linear layers whose weights are kept in fewer bits: what they share, and the one of 4 bits.

Linear4bit takes the place of bitsandbytes' own, with the same bytes, for three reasons. Its statistics are a parameter,
so that ZeRO-3 shards them with the weight. It saves no dequantized or gathered weight for backward. And it never
repacks its weight in place, as bitsandbytes' forward does on some CPUs, after which no gradient passes through.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from qlora.ops import compiled, nf4, nf4_format
from qlora.ops.lora_linear import lora_linear
from qlora.ops.nf4 import QuantSpec


class QuantizedLinear(nn.Linear, ABC):
    """y = x W^T + b with W frozen in fewer bits; select by this type what is not to depend on their number.

    Attributes:
        weight: the packed bytes of W; frozen.
        statistics: uint8, flat: the scales of W as bytes; frozen.
        bias: (out_features,) in the dtype of the base, or None; frozen.
        compute_dtype: dtype that W is dequantized to and multiplied in.
        weight_dtype: dtype W had before it was quantized.
        transposed_in_files: its files hold W as (in, out) where they hold it unquantized (transformers' Conv1D).
    """

    weight: nn.Parameter
    statistics: nn.Parameter
    transposed_in_files = False

    def __init__(
        self, packed: Tensor, statistics_bytes: int, shape: tuple[int, int], bias: bool, compute_dtype: torch.dtype
    ) -> None:
        """A layer of shape (out, in) around packed bytes, with statistics and bias, where it has one, of any value."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.compute_dtype = self.weight_dtype = compute_dtype
        statistics = torch.empty(statistics_bytes, dtype=torch.uint8, device=packed.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.statistics = nn.Parameter(statistics, requires_grad=False)
        empty_bias = torch.empty(self.out_features, dtype=compute_dtype, device=packed.device)
        self.register_parameter("bias", nn.Parameter(empty_bias, requires_grad=False) if bias else None)

    @abstractmethod
    def quantize(self, weight: Tensor, place: str = "") -> tuple[Tensor, Tensor]:
        """Packed bytes and statistics of a weight (out, in), as this layer keeps them. Raises BaseModelError."""

    @abstractmethod
    def unpack(self, packed: Tensor, statistics: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that such bytes stand for."""

    @abstractmethod
    def borrow(self) -> Tensor:
        """W (out, in) in the compute dtype, to be done with before this thread dequantizes again."""

    def set_packed(self, packed: Tensor, statistics: Tensor, weight_dtype: torch.dtype) -> None:
        """Give the layer its bytes."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.statistics = nn.Parameter(statistics, requires_grad=False)
        self.weight_dtype = weight_dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in), in the compute dtype unless another is given. Reads the parameters as they are now."""
        return self.unpack(self.weight.data, self.statistics.data, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.borrow, self.bias, None, None, 1.0)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Move, never cast: packed bytes stored as floats would be converted as if they were numbers."""
        kept = {name: getattr(self, name).data for name in ("weight", "statistics")}
        super()._apply(fn, recurse)
        for name, raw in kept.items():
            parameter = getattr(self, name)  # a cast puts other data into the same parameter
            if parameter.dtype != raw.dtype:
                parameter.data = raw.to(parameter.device)
        return self


class Linear4bit(QuantizedLinear):
    """y = x W^T + b with W frozen in 4 bits.

    Attributes:
        weight: packed W, dtype `spec.storage`, shape (bytes / itemsize, 1); frozen.
        statistics: uint8 (bytes,), the scales of W (layout in `qlora.ops.nf4`); frozen.
        bias, compute_dtype, weight_dtype: see `QuantizedLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        num_elements = in_features * out_features
        packed = torch.empty(spec.packed_shape(num_elements), dtype=spec.storage, device=device)
        shape = (out_features, in_features)
        super().__init__(packed, spec.statistics_bytes(num_elements), shape, bias, compute_dtype)
        self.spec = spec

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
        packed, statistics, spec, (out_features, in_features) = nf4_format.from_linear4bit(linear, place)
        layer = cls(in_features, out_features, linear.bias is not None, spec, compute_dtype, device="meta")
        layer.set_packed(packed, statistics, linear.weight.quant_state.dtype)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def quantize(self, weight: Tensor, place: str = "") -> tuple[Tensor, Tensor]:
        return nf4.quantize(weight, self.spec)

    def unpack(self, packed: Tensor, statistics: Tensor, dtype: torch.dtype) -> Tensor:
        return nf4.dequantize(packed, statistics, self.spec, (self.out_features, self.in_features), dtype)

    def borrow(self) -> Tensor:
        shape = (self.out_features, self.in_features)
        if torch.compiler.is_compiling():
            return compiled.dequantize(self.weight.data, self.statistics.data, self.spec, shape, self.compute_dtype)
        return nf4.dequantize_borrowed(self.weight.data, self.statistics.data, self.spec, shape, self.compute_dtype)

    def extra_repr(self) -> str:
        bits = f"{self.spec.quant_type}, block {self.spec.block_size}, double quantization {self.spec.double_quant}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {bits}"
