"""A frozen linear layer whose weight is kept in 8 bits.

It keeps the bytes of bitsandbytes' Linear8bitLt and computes something simpler. LLM.int8() (Dettmers et al. 2022) quantizes
the inputs as well, row by row and anew in every forward pass, multiplies int8 by int8, and computes columns of inputs with
outliers (beyond 6.0) in 16 bits beside it. Here the weight alone is quantized, and is dequantized to be multiplied with:
what the layer computes is a linear function, of one weight. So gradients are those of the function that was computed,
merging adds to the very weight that was trained on, and a token's output does not depend on the other tokens' outliers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.ops import int8
from qlora.quant.linear import QuantizedLinear


class Linear8bit(QuantizedLinear):
    """y = x W^T + b with W frozen in 8 bits.

    Attributes:
        weight: int8 (out_features, in_features); frozen.
        statistics: uint8 (4 * out_features,), the rows' absmax as fp32 (layout in `qlora.ops.int8`); frozen.
        bias, compute_dtype, weight_dtype: see `QuantizedLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        packed = torch.empty((out_features, in_features), dtype=torch.int8, device=device)
        super().__init__(packed, int8.statistics_bytes(out_features), (out_features, in_features), bias, compute_dtype)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Linear8bit:
        """Quantize a weight (out, in) whose dtype becomes the compute dtype. Raises BaseModelError, see `int8.quantize`."""
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, weight.dtype, device="meta")
        layer.set_packed(*layer.quantize(weight.detach()), weight.dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @classmethod
    def from_bitsandbytes(cls, linear: Any, compute_dtype: torch.dtype, place: str = "") -> Linear8bit:
        """Take over a bitsandbytes Linear8bitLt without copying its weight. Raises BaseModelError.

        Args:
            compute_dtype: its own layer knows none, and computes in the dtype of its input.
        """
        packed, statistics = int8.from_linear8bit(linear, place)
        layer = cls(packed.shape[1], packed.shape[0], linear.bias is not None, compute_dtype, device="meta")
        layer.set_packed(packed, statistics, torch.float16)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def quantize(self, weight: Tensor, place: str = "") -> tuple[Tensor, Tensor]:
        return int8.quantize(weight, place)

    def unpack(self, packed: Tensor, statistics: Tensor, dtype: torch.dtype) -> Tensor:
        return int8.dequantize(packed, statistics, dtype)

    def borrow(self) -> Tensor:
        return int8.dequantize_borrowed(self.weight.data, self.statistics.data, self.compute_dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, int8 rows"
