"""All kinds of LoRA layers, and which of them fits a module."""

from __future__ import annotations

from torch import nn

from qlora.lora.conv import LoraConv1d, LoraConv2d
from qlora.lora.embedding import LoraEmbedding
from qlora.lora.experts import LoraExperts, LoraExpertWeight
from qlora.lora.layer import LoraLayer
from qlora.lora.linear import LoraLinear

KINDS: tuple[type[LoraLayer], ...] = (LoraLinear, LoraEmbedding, LoraConv1d, LoraConv2d, LoraExpertWeight)
# What stands in the place of a module of the base; ZeRO-3 gathers each as one.
WRAPPERS = (LoraLayer, LoraExperts)


def kind_of(module: nn.Module) -> type[LoraLayer] | None:
    """The kind of LoRA layer that can wrap a module, also of one that is wrapped; None where there is none."""
    if isinstance(module, LoraLayer):
        return type(module)
    return next((kind for kind in KINDS if kind.supports(module)), None)
