"""What every layer with a low-rank update shares: updates by name, one of them active, merging, and leaving them out.

    h = W x + s B A dropout(x),    s = lora_alpha / r        (Hu et al. 2021, equation 3)

A starts random and B at zero, so that training starts at the base's own function. A layer holds several updates by name
(adapters) and applies the active one. Each kind of layer has a file of its own; `lora.kinds` knows them all.

While merged, a layer computes with W + s B A, kept beside the frozen weight, which is never written to: unmerging gives
back exactly what was there, also where W is in 4 bits.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.initial import gaussian_A
from qlora.lora.update import Update


class LoraLayer(nn.Module, ABC):
    """A wrapped, frozen layer with low-rank updates by name; select by this type.

    Attributes:
        TABLES: what an adapter file calls each tensor of an update behind the layer's path -> the table that holds it here.
        base_layer: the wrapped, frozen layer.
        lora_A, lora_B, lora_bias, lora_magnitude_vector: parameters by adapter name; the last two only where used.
        updates: rank, scaling and variant by adapter name.
        active_adapter: the one that is applied, or None.
        enabled: False inside `disable_adapter`.
        by_row: True inside `adapters_by_row`.
        merged_adapter: the one that is merged, or None.
    """

    TABLES: ClassVar[dict[str, str]] = {
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_B.bias": "lora_bias",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }

    base_layer: nn.Module
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_bias: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for attribute in self.TABLES.values():
            setattr(self, attribute, nn.ParameterDict())
        self.updates: dict[str, Update] = {}
        self.active_adapter: str | None = None
        self.enabled = True
        self.by_row = False
        self.merged_adapter: str | None = None

    @classmethod
    @abstractmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether a layer of this kind can wrap this module."""

    @classmethod
    @abstractmethod
    def shapes(cls, module: nn.Module, update: Update) -> dict[str, tuple[int, ...]]:
        """Shapes of an update's tensors over a module, by their names in a file.

        Raises:
            ConfigError: a variant that mathematics or the file format forbids for this kind.
        """

    @abstractmethod
    def initial_magnitude(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """DoRA's magnitude for these factors, at which the layer computes W + s B A. Collective where W is in shares."""

    @abstractmethod
    def merge(self) -> None:
        """Add the active update to a copy of the weight and use that from now on. Raises AdapterError."""

    @abstractmethod
    def unmerge(self) -> None:
        """Go back to the weight and the update beside it. Raises AdapterError where nothing is merged."""

    def add_adapter(
        self,
        name: str,
        config: LoraConfig,
        path: str,
        seed: int,
        values: Mapping[str, Tensor] | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add an update and make it active.

        Args:
            path: of this layer in the model. A's initial values depend on it and on the seed alone.
            values: the tensors of `shapes`, where they are known; collective without them if the update is DoRA and the
                weight is in shares.
            start: A and B that training starts from, where they are not the default ones.

        Raises:
            AdapterError: the name is taken.
            ConfigError: see `shapes`.
        """
        if name in self.updates:
            raise AdapterError(f"the layer has an adapter {name!r} already", place=path)
        update = Update.of(config, path)
        shapes = self.shapes(self.base_layer, update)
        if start is None and values is None and config.init_lora_weights == "gaussian":
            start = self._gaussian_start(update, shapes, path, seed)
        values = dict(values) if values is not None else self._initial_values(update, shapes, path, seed, start)
        device, dtype = self._device(), getattr(torch, config.dtype)
        for part in shapes:
            # Narrower than the norm that it is divided by, a magnitude would not start at the base's own function.
            wide = self.TABLES[part] == "lora_magnitude_vector"
            value = values[part].to(device=device, dtype=torch.float32 if wide else dtype, copy=True)
            self.table(part)[name] = nn.Parameter(value)
        self.updates[name] = update
        self.set_active(name)

    def _gaussian_start(
        self, update: Update, shapes: dict[str, tuple[int, ...]], path: str, seed: int
    ) -> tuple[Tensor, Tensor] | None:
        """A normal and B zero; None for an embedding, whose A is zero and B normal whatever is asked for (as in PEFT)."""
        part_A, part_B = list(self.TABLES)[:2]
        if not part_A.startswith("lora_A"):
            return None
        return gaussian_A(shapes[part_A], update.r, generator_of(path, seed)), torch.zeros(shapes[part_B])

    def _initial_values(
        self,
        update: Update,
        shapes: dict[str, tuple[int, ...]],
        path: str,
        seed: int,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Values at which the layer computes the base's own function, or what it does with A and B as they are given."""
        device = self._device()
        values = {part: torch.zeros(shape, device=device) for part, shape in shapes.items()}
        part_A, part_B = list(self.TABLES)[:2]
        if start is None:
            values[part_A] = self.initial_A(shapes[part_A], path, seed).to(device)
        else:
            values[part_A], values[part_B] = (part.to(device) for part in start)
        if update.use_dora:
            magnitude = self.initial_magnitude(values[part_A], values[part_B], update.scaling)
            values["lora_magnitude_vector"] = magnitude.reshape(shapes["lora_magnitude_vector"])
        return values

    def initial_A(self, shape: tuple[int, ...], path: str, seed: int) -> Tensor:
        """The A that training starts from, fp32 on the CPU."""
        return initial_A(shape, path, seed)

    def remove_adapter(self, name: str) -> None:
        """Forget an update. Where it was the active one, none is active then."""
        if self.merged_adapter == name:
            self.unmerge()
        for part in self.parts(name):
            del self.table(part)[name]
        del self.updates[name]
        if self.active_adapter == name:
            self.set_active(None)

    def table(self, part: str) -> nn.ParameterDict:
        """The parameters by adapter name that a file calls by this name."""
        table: nn.ParameterDict = getattr(self, self.TABLES[part])
        return table

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one update by their names in a file."""
        return {part: self.table(part)[name] for part in self.TABLES if name in self.table(part)}

    def adds_to_base(self, names: Iterable[str | None]) -> bool:
        """Whether, for all these updates, this kind's output is the base's plus `low_rank`."""
        return False

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """An update's part of the output, where `adds_to_base`; without dropout. Not to be asked of other kinds."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing to its base's output")

    @property
    def num_factors(self) -> int:
        """How many pairs of factors share out an update's rank: a grouped convolution has one for each group."""
        return 1

    def to_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """An update's factors as matrices, fp32: A (1, r, inputs), B (1, outputs, r), so that its delta is s B A."""
        part_A, part_B = list(self.TABLES)[:2]
        A, B = (self.table(part)[name].detach().float() for part in (part_A, part_B))
        r = self.updates[name].r
        return A.reshape(1, r, -1), B.reshape(1, -1, r)

    def from_factors(self, A: Tensor, B: Tensor, update: Update) -> dict[str, Tensor]:
        """The reverse of `to_factors`: an update's tensors by their names in a file."""
        shapes = self.shapes(self.base_layer, update)
        return {part: factor.reshape(shapes[part]) for part, factor in zip(list(self.TABLES)[:2], (A, B), strict=True)}

    def set_active(self, name: str | None) -> None:
        """Choose which update is applied; it alone is trainable."""
        self.active_adapter = name
        for own in self.updates:
            for parameter in self.parts(own).values():
                parameter.requires_grad_(own == name)

    @property
    def applied(self) -> str | None:
        """The update that a forward pass applies now: the active one, unless it is left out or merged into the weight."""
        return self.active_adapter if self.enabled and self.merged_adapter is None else None

    @property
    def computes_merged(self) -> bool:
        """Whether a forward pass now computes with the merged weight."""
        return self.enabled and self.merged_adapter is not None

    def _device(self) -> torch.device:
        return next(self.base_layer.parameters()).device

    def _check_can_merge(self) -> str:
        """The name of the update to merge. Raises AdapterError where none can be."""
        if self.active_adapter is None:
            raise AdapterError("there is no active adapter to merge")
        if self.merged_adapter is not None:
            raise AdapterError(f"the adapter {self.merged_adapter!r} is merged already", next_step="unmerge it first")
        if any(p.numel() == 0 for p in self.base_layer.parameters()):
            raise AdapterError("the weight is partitioned over ranks", next_step="save the adapter and use `qlora merge`")
        return self.active_adapter

    def _check_can_unmerge(self) -> None:
        if self.merged_adapter is None:
            raise AdapterError("no adapter is merged")


def refuse_variants(update: Update, kind: str, **forbidden: str) -> None:
    """Raise ConfigError where an update uses what this kind of layer cannot: attribute of Update -> the reason."""
    for attribute, reason in forbidden.items():
        if getattr(update, attribute):
            raise ConfigError(
                f"{kind} cannot have it: {reason}", place=f"lora.{attribute}", found=getattr(update, attribute)
            )


def initial_A(shape: tuple[int, ...], path: str, seed: int) -> Tensor:
    """A (r, in, ...), fp32 on the CPU, Kaiming-uniform with a = sqrt(5): uniform in +-1/sqrt(inputs of one row).

    A function of the seed and the module's path, so that every rank, and every number of ranks, makes the same.
    """
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(path, seed))


def generator_of(path: str, seed: int) -> torch.Generator:
    """Random numbers of one module, the same on every rank."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """All LoRA layers of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def trained_B(model: nn.Module) -> list[nn.Parameter]:
    """B of every update that trains, and B's bias; every kind of layer has its B second in `TABLES`."""
    found = []
    for _, layer in lora_layers(model):
        part_B = next(iter(list(layer.TABLES)[1:]), "none")  # rows of tokens are no product
        for name in layer.updates:
            own = layer.parts(name)
            found += [own[part] for part in (part_B, "lora_B.bias") if part in own and own[part].requires_grad]
    return found


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Compute the base's own function inside the context; merged updates are left out too.

    Raises:
        AdapterError: the adapter trained modules as wholes, which have taken the place of the base's own, or the base is
            the residual that it started from.
    """
    initial = model.__dict__.get("qlora_initial")
    if initial is not None and initial.changes_base:
        raise AdapterError(
            f"the base is what was left of it when the adapter started ({initial.method}): alone it computes no sense",
            next_step="load the base again without the adapter",
        )
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
    refuse_by_row(model)
    refuse_merged(model)
    for layer in layers:
        layer.merge()


def refuse_merged(model: nn.Module) -> None:
    """Raise AdapterError where an adapter is merged: what is added or trained beside it would have no effect."""
    merged = next((layer.merged_adapter for _, layer in lora_layers(model) if layer.merged_adapter is not None), None)
    if merged is not None:
        raise AdapterError(f"the adapter {merged!r} is merged already", next_step="unmerge it first")


def refuse_by_row(model: nn.Module) -> None:
    """Raise AdapterError inside `adapters_by_row`, for what would change which adapters there are, or which is used."""
    if any(layer.by_row for _, layer in lora_layers(model)):
        raise AdapterError("inside adapters_by_row every row has its adapter already", next_step="leave that context first")


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter` exactly. Raises AdapterError where nothing is merged."""
    layers = [layer for _, layer in lora_layers(model) if layer.merged_adapter is not None]
    if not layers:
        raise AdapterError("no adapter is merged")
    for layer in layers:
        layer.unmerge()
