"""LoRA over a convolution: torch's Conv1d and Conv2d (LoRA's own repository, ConvLoRA; PEFT's shapes)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.distributed.collectives import gathered
from qlora.errors import ConfigError
from qlora.lora.layer import LoraLayer, refuse_variants
from qlora.lora.update import Update
from qlora.ops.lora_conv import Geometry, channel_norms, kernel_of, lora_conv


class LoraConv(LoraLayer):
    """y = W * x + b + s (B * (A * dropout(x)) + c); with DoRA y = m / |W + s B A| (...) + b, norms of output channels.

    A has the base's kernel, stride, padding, padding mode and dilation, and B a kernel of one point.

    Shapes, for a kernel K and g groups: W (out, in / g, K), A (r, in, K), B (out, r / g, 1...), c (out,), m (1, out, 1...).

    A is not grouped (as in PEFT), so that of several groups the update connects what the base keeps apart. Its sum with
    W is a kernel over all input channels, which is what a merged layer computes with; it has no place in the base's files.
    PEFT (0.21) leaves dilation and padding mode out of A: where a base has these, a file of PEFT's computes here what it
    would compute merged.
    """

    KIND: ClassVar[type[nn.Module]]

    base_layer: Any
    _merged_weight: Tensor | None
    _merged_bias: Tensor | None

    @property
    def num_factors(self) -> int:
        groups: int = self.base_layer.groups
        return groups

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.register_buffer("_merged_weight", None, persistent=False)
        self.register_buffer("_merged_bias", None, persistent=False)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether it is torch's own convolution of this many dimensions."""
        return type(module) is cls.KIND

    @classmethod
    def shapes(cls, module: nn.Module, update: Update) -> dict[str, tuple[int, ...]]:
        conv: Any = module
        num_dimensions, groups = len(conv.kernel_size), conv.groups
        ones = (1,) * num_dimensions
        if update.r % groups:
            raise ConfigError(
                f"each group of a convolution has its own part of the rank, and {groups} groups do not divide it",
                place="lora.r",
                found=update.r,
                wanted=f"a multiple of {groups}, or leave the layer out (lora.exclude_modules)",
            )
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (update.r, conv.in_channels, *conv.kernel_size),
            "lora_B.weight": (conv.out_channels, update.r // groups, *ones),
        }
        if update.use_dora:
            refuse_variants(
                update, "a DoRA layer", lora_bias="its magnitude scales directions, and a bias has none (as in PEFT)"
            )
            if groups > 1:
                refuse_variants(
                    update,
                    f"a convolution of {groups} groups",
                    use_dora="its update reaches beyond each group's inputs, so that the sum whose norm DoRA takes has not "
                    "the shape of the base's kernel (PEFT takes norms over mixed-up groups)",
                )
            shapes["lora_magnitude_vector"] = (1, conv.out_channels, *ones)
        if update.lora_bias:
            shapes["lora_B.bias"] = (conv.out_channels,)
        return shapes

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as other code looks for it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def initial_magnitude(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        with gathered(self.base_layer.parameters()):
            return channel_norms(self.base_layer.weight.data, lora_A, lora_B, scaling)

    def to_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors by group, fp32: A (g, r / g, in K), B (g, out / g, r / g), whose products one after another are B A."""
        A, B = (table[name].detach().float() for table in (self.lora_A, self.lora_B))
        groups = self.base_layer.groups
        return A.reshape(groups, A.shape[0] // groups, -1), B.reshape(groups, B.shape[0] // groups, -1)

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A (out, in, K), multiplied in fp32 or wider; without DoRA's magnitude."""
        A, B = self.lora_A[name].detach(), self.lora_B[name].detach()
        wide = torch.promote_types(torch.promote_types(A.dtype, torch.float32), dtype)
        return (kernel_of(A.to(wide), B.to(wide), self.base_layer.groups) * self.updates[name].scaling).to(dtype)

    def merge(self) -> None:
        """Add the active update to a copy of W, and of the bias, and use these from now on.

        Raises:
            AdapterError: there is no active update, one is merged already, or ZeRO-3 has partitioned the weight.
        """
        name = self._check_can_merge()
        weight = self.base_layer.weight.data
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = ungrouped(weight.to(wide), self.base_layer.groups) + self.delta(name, wide)
        if name in self.lora_magnitude_vector:
            norms = channel_norms(weight, self.lora_A[name], self.lora_B[name], self.updates[name].scaling)
            factors = self.lora_magnitude_vector[name].detach().to(wide) / norms
            merged *= factors.reshape(-1, *[1] * (merged.ndim - 1))
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
        base = self.base_layer
        num_dimensions = len(base.kernel_size)
        is_single = x.ndim == num_dimensions + 1
        x, geometry = _padded(base, x.unsqueeze(0) if is_single else x)
        name, options = self.applied, {"geometry": geometry, "groups": base.groups}
        if self.computes_merged:
            bias = self.bias if self._merged_bias is None else self._merged_bias
            y = lora_conv(x, lambda: self._merged_weight, bias, None, None, 1.0, geometry=geometry, groups=1)  # type: ignore[arg-type, return-value]
        elif name is None:
            y = lora_conv(x, lambda: base.weight.data, self.bias, None, None, 1.0, **options)
        else:
            update = self.updates[name]
            y = lora_conv(
                x,
                lambda: base.weight.data,
                self.bias,
                self.lora_A[name],
                self.lora_B[name],
                update.scaling,
                update.dropout if self.training else 0.0,
                lora_bias_O=self.lora_bias[name] if update.lora_bias else None,
                magnitude=self.lora_magnitude_vector[name] if update.use_dora else None,
                **options,
            )
        return y.squeeze(0) if is_single else y


class LoraConv1d(LoraConv):
    """LoRA over torch's Conv1d."""

    KIND = nn.Conv1d


class LoraConv2d(LoraConv):
    """LoRA over torch's Conv2d."""

    KIND = nn.Conv2d


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """A kernel (out, in / g, K) as one over all input channels (out, in, K), zero between groups."""
    if groups == 1:
        return weight
    out, own = weight.shape[:2]
    whole = weight.new_zeros(groups, out // groups, groups, *weight.shape[1:])
    for group, part in enumerate(weight.reshape(groups, out // groups, *weight.shape[1:])):
        whole[group, :, group] = part
    return whole.reshape(out, groups * own, *weight.shape[2:])


def _padded(base: Any, x: Tensor) -> tuple[Tensor, Geometry]:
    """The input, padded where more than zeros on both sides is asked for, and how the kernel is laid over it."""
    if base.padding_mode == "zeros" and not isinstance(base.padding, str):
        return x, Geometry(base.stride, base.padding, base.dilation)
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=mode)
    return x, Geometry(base.stride, (0,) * len(base.stride), base.dilation)
