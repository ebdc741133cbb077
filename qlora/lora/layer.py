"""The LoRA layer: a frozen linear layer with a trainable low-rank update beside it.

    h = W x + s B A dropout(x),    s = lora_alpha / r        (Hu et al. 2021, equation 3)

A (r, in) starts random and B (out, r) starts at zero, so that training starts at the base's own function. A layer holds
several updates by name (adapters) and applies the active one. Its arithmetic is one autograd function
(`qlora.ops.lora_linear`); it never calls the base layer's forward.

While merged, a layer multiplies with W + s B A, kept beside the frozen weight, which is never written to: unmerging
gives back exactly what was there, also where W is in 4 bits.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.ops.lora_linear import lora_linear
from qlora.quant.linear import Linear4bit


class LoraLayer(nn.Module, ABC):
    """What every layer with named low-rank updates shares; select by this type.

    Attributes:
        base_layer: the wrapped, frozen layer.
        lora_A, lora_B: parameters by adapter name.
        scaling: s by adapter name.
        active_adapter: the one that is applied, or None.
        enabled: False inside `disable_adapter`.
        merged_adapter: the one that is merged, or None.
    """

    base_layer: nn.Module
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active_adapter: str | None = None
        self.enabled = True
        self.merged_adapter: str | None = None

    def add_adapter(self, name: str, config: LoraConfig, path: str, seed: int) -> None:
        """Add an update and make it active. A's values depend on the seed and the module's path alone.

        Raises:
            AdapterError: the name is taken.
        """
        if name in self.lora_A:
            raise AdapterError(f"the layer has an adapter {name!r} already", place=path)
        device = self._device()
        dtype = getattr(torch, config.dtype)
        lora_A = initial_A(config.r, self.in_features, path, seed).to(device=device, dtype=dtype)
        self.lora_A[name] = nn.Parameter(lora_A)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, config.r, device=device, dtype=dtype))
        self.r[name] = config.r
        self.scaling[name] = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.dropout[name] = config.lora_dropout
        self.set_active(name)

    def remove_adapter(self, name: str) -> None:
        """Forget an update. Where it was the active one, none is active then."""
        if self.merged_adapter == name:
            self.unmerge()
        del self.lora_A[name], self.lora_B[name], self.r[name], self.scaling[name], self.dropout[name]
        if self.active_adapter == name:
            self.set_active(None)

    def set_active(self, name: str | None) -> None:
        """Choose which update is applied; it alone is trainable."""
        self.active_adapter = name
        for table in (self.lora_A, self.lora_B):
            for own, parameter in table.items():
                parameter.requires_grad_(own == name)

    def _device(self) -> torch.device:
        return next(self.base_layer.parameters()).device

    @abstractmethod
    def merge(self) -> None:
        """Add the active update to a copy of the weight and use that from now on. Raises AdapterError."""

    @abstractmethod
    def unmerge(self) -> None:
        """Go back to the weight and the update beside it. Raises AdapterError where nothing is merged."""


class LoraLinear(LoraLayer):
    """LoRA over `nn.Linear` or `Linear4bit`, with or without bias."""

    base_layer: nn.Linear
    _merged_weight: Tensor | None

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer, base_layer.in_features, base_layer.out_features)
        # A buffer, so that it moves with the layer; never part of what is saved.
        self.register_buffer("_merged_weight", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as other code looks for it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def base_weight(self) -> Tensor:
        """W (out, in) in the dtype to compute in, read anew from the base layer's parameters."""
        if isinstance(self.base_layer, Linear4bit):
            return self.base_layer.dequantize()
        return self.base_layer.weight.data

    def _borrow_weight(self) -> Tensor:
        """W as `base_weight` gives it, to be done with before this thread asks for another."""
        return self.base_layer.borrow() if isinstance(self.base_layer, Linear4bit) else self.base_layer.weight.data

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A (out, in), multiplied in fp32 or wider."""
        wide = torch.promote_types(self.lora_A[name].dtype, torch.float32)
        product = self.lora_B[name].detach().to(wide) @ self.lora_A[name].detach().to(wide)
        return (product * self.scaling[name]).to(dtype)

    def merge(self) -> None:
        """Add the active update to a copy of W and use that from now on.

        Raises:
            AdapterError: there is no active update, one is merged already, or ZeRO-3 has partitioned the weight.
        """
        if self.active_adapter is None:
            raise AdapterError("there is no active adapter to merge")
        if self.merged_adapter is not None:
            raise AdapterError(f"the adapter {self.merged_adapter!r} is merged already", next_step="unmerge it first")
        if self.base_layer.weight.numel() == 0:
            raise AdapterError("the weight is partitioned over ranks", next_step="save the adapter and use `qlora merge`")
        weight = self.base_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._merged_weight = (weight.to(wide) + self.delta(self.active_adapter, wide)).to(weight.dtype)
        self.merged_adapter = self.active_adapter

    def unmerge(self) -> None:
        """Go back to W and the update beside it. Raises AdapterError where nothing is merged."""
        if self.merged_adapter is None:
            raise AdapterError("no adapter is merged")
        self._merged_weight = self.merged_adapter = None

    def forward(self, x: Tensor) -> Tensor:
        name = self.active_adapter if self.enabled else None
        if name is None or self._merged_weight is not None:
            use_merged = self._merged_weight is not None and self.enabled
            read: Callable[[], Tensor] = (lambda: self._merged_weight) if use_merged else self._borrow_weight  # type: ignore[assignment, return-value]
            return lora_linear(x, read, self.base_layer.bias, None, None, 1.0)
        dropout = self.dropout[name] if self.training else 0.0
        return lora_linear(
            x, self._borrow_weight, self.base_layer.bias, self.lora_A[name], self.lora_B[name], self.scaling[name], dropout
        )


def initial_A(r: int, in_features: int, path: str, seed: int) -> Tensor:
    """A (r, in), fp32 on the CPU, Kaiming-uniform with a = sqrt(5): uniform in +-1/sqrt(in).

    A function of the seed and the module's path, so that every rank, and every number of ranks, makes the same.
    """
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """All LoRA layers of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Compute the base's own function inside the context; merged updates are left out too.

    Raises:
        AdapterError: the adapter trained modules as wholes, which have taken the place of the base's own.
    """
    if any(record.trained for record in model.__dict__.get("qlora_adapters", {}).values()):
        raise AdapterError(
            "modules that were trained as wholes have replaced the base's own, so they cannot be left out",
            next_step="load the base again without the adapter",
        )
    before = [(layer, layer.enabled) for _, layer in lora_layers(model)]
    for layer, _ in before:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def merge_adapter(model: nn.Module) -> None:
    """Merge the active adapter in every layer it adapts; all or none. Raises AdapterError."""
    layers = [layer for _, layer in lora_layers(model) if layer.active_adapter is not None]
    if not layers:
        raise AdapterError("the model has no LoRA layers with an active adapter")
    refuse_merged(model)
    for layer in layers:
        layer.merge()


def refuse_merged(model: nn.Module) -> None:
    """Raise AdapterError where an adapter is merged: what is added or trained beside it would have no effect."""
    merged = next((layer.merged_adapter for _, layer in lora_layers(model) if layer.merged_adapter is not None), None)
    if merged is not None:
        raise AdapterError(f"the adapter {merged!r} is merged already", next_step="unmerge it first")


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter` exactly. Raises AdapterError where nothing is merged."""
    layers = [layer for _, layer in lora_layers(model) if layer.merged_adapter is not None]
    if not layers:
        raise AdapterError("no adapter is merged")
    for layer in layers:
        layer.unmerge()
