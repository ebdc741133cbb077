"""LoRA over a linear layer: torch's, transformers' Conv1D, ours in 4 and in 8 bits, with or without bias; also as a head.

Its arithmetic is one autograd function (`qlora.ops.lora_linear`); it never calls the base layer's forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.collectives import gathered
from qlora.lora.layer import LoraLayer, refuse_variants
from qlora.lora.update import Update
from qlora.ops import nf4
from qlora.ops.lora_linear import lora_linear, row_norms
from qlora.quant.linear import Linear4bit, QuantizedLinear
from qlora.quant.linear8bit import Linear8bit


class LoraLinear(LoraLayer):
    """h = W x + b + s (B A dropout(x) + c); with DoRA h = m / |W + s B A| (W x + s B A dropout(x)) + b.

    Shapes: A (r, in), B (out, r), c and m (out,); |V| is the norm of each row of V (out,), as in PEFT. The paper writes of
    columns, because its W maps from the left (Liu et al. 2024, equation 5).
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_bias: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    _merged_weight: Tensor | None
    _merged_bias: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = features(base_layer)
        # Buffers, so that they move with the layer; never part of what is saved.
        self.register_buffer("_merged_weight", None, persistent=False)
        self.register_buffer("_merged_bias", None, persistent=False)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether it is torch's Linear, transformers' Conv1D, or a layer in 4 or 8 bits, ours or bitsandbytes'.

        Other subclasses of Linear may compute something else in their forward, which a LoRA layer would leave out, or are
        never called, as the one in torch's MultiheadAttention, whose weight alone is used.
        """
        known = type(module) in (nn.Linear, Linear4bit, Linear8bit) or is_conv1d(module)
        return known or isinstance(module, (nf4.BnbLinear4bit, nf4.BnbLinear8bit))

    @classmethod
    def shapes(cls, module: nn.Module, update: Update) -> dict[str, tuple[int, ...]]:
        num_inputs, num_outputs = features(module)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (update.r, num_inputs),
            "lora_B.weight": (num_outputs, update.r),
        }
        if update.use_dora:
            refuse_variants(
                update, "a DoRA layer", lora_bias="its magnitude scales directions, and a bias has none (as in PEFT)"
            )
            shapes["lora_magnitude_vector"] = (num_outputs,)
        if update.lora_bias:
            shapes["lora_B.bias"] = (num_outputs,)
        return shapes

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as other code looks for it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def base_weight(self) -> Tensor:
        """W (out, in) in the dtype to compute in, read anew from the base layer's parameters."""
        if isinstance(self.base_layer, QuantizedLinear):
            return self.base_layer.dequantize()
        return self._borrow_weight()

    def _borrow_weight(self) -> Tensor:
        """W as `base_weight` gives it, to be done with before this thread asks for another."""
        if isinstance(self.base_layer, QuantizedLinear):
            return self.base_layer.borrow()
        weight: Tensor = self.base_layer.weight.data  # type: ignore[assignment]
        return weight.T if is_conv1d(self.base_layer) else weight

    def initial_magnitude(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        with gathered(self.base_layer.parameters()):
            return row_norms(self._borrow_weight(), lora_A, lora_B, scaling)

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A (out, in), multiplied in fp32 or wider; without DoRA's magnitude."""
        wide = torch.promote_types(self.lora_A[name].dtype, torch.float32)
        product = self.lora_B[name].detach().to(wide) @ self.lora_A[name].detach().to(wide)
        return (product * self.updates[name].scaling).to(dtype)

    def adds_to_base(self, names: Iterable[str | None]) -> bool:
        return not any(self.updates[name].use_dora for name in names if name in self.updates)

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        dtype, update = x.dtype, self.updates[name]
        out = (x @ self.lora_A[name].to(dtype).T) @ self.lora_B[name].to(dtype).T
        if update.lora_bias:
            out += self.lora_bias[name].to(dtype)
        return out * update.scaling

    def merge(self) -> None:
        """Add the active update to a copy of W, and of the bias, and use these from now on.

        Raises:
            AdapterError: there is no active update, one is merged already, or ZeRO-3 has partitioned the weight.
        """
        name = self._check_can_merge()
        weight = self.base_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.to(wide) + self.delta(name, wide)
        if name in self.lora_magnitude_vector:
            norms = row_norms(weight, self.lora_A[name], self.lora_B[name], self.updates[name].scaling)
            merged *= (self.lora_magnitude_vector[name].detach().to(wide) / norms).unsqueeze(1)
        self._merged_weight = merged.to(weight.dtype)
        if name in self.lora_bias:
            bias = self.lora_bias[name].detach().to(wide) * self.updates[name].scaling
            self._merged_bias = (bias if self.bias is None else bias + self.bias.to(wide)).to(weight.dtype)
        self.merged_adapter = name

    def unmerge(self) -> None:
        """Go back to W and the update beside it. Raises AdapterError where nothing is merged."""
        self._check_can_unmerge()
        self._merged_weight = self._merged_bias = self.merged_adapter = None

    def forward(self, x: Tensor) -> Tensor:
        if self.computes_merged:
            merged = self._merged_weight
            bias = self.bias if self._merged_bias is None else self._merged_bias
            return lora_linear(x, lambda: merged, bias, None, None, 1.0)  # type: ignore[arg-type, return-value]
        name = self.applied
        if name is None:
            return lora_linear(x, self._borrow_weight, self.bias, None, None, 1.0)
        update = self.updates[name]
        return lora_linear(
            x,
            self._borrow_weight,
            self.bias,
            self.lora_A[name],
            self.lora_B[name],
            update.scaling,
            update.dropout if self.training else 0.0,
            layer=update.layer,
            lora_bias_O=self.lora_bias[name] if update.lora_bias else None,
            magnitude_O=self.lora_magnitude_vector[name] if update.use_dora else None,
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (GPT-2), a linear layer that keeps its weight as (in, out)."""
    defined = sys.modules.get("transformers.pytorch_utils")  # without it there can be none
    return defined is not None and type(module) is defined.Conv1D


def features(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    return (module.nx, module.nf) if is_conv1d(module) else (module.in_features, module.out_features)
