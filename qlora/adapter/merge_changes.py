"""What an adapter does to each parameter of the base: which tensors of its file, by which rule. And the rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter.keys import AdapterKey
from qlora.adapter.merge_weight import (
    LowRank,
    Rows,
    as_matrix,
    plus,
    plus_vector,
    with_magnitude,
    with_rows,
)
from qlora.adapter.read import WEIGHTS_NAME, AdapterFile, refuse
from qlora.errors import AdapterError, BaseModelError, ConfigError
from qlora.lora.expert_paths import module_at
from qlora.lora.experts import ExpertWeight
from qlora.lora.kinds import kind_of
from qlora.lora.linear import is_conv1d
from qlora.lora.token_rows import ROWS
from qlora.lora.update import Update
from qlora.quant.linear import QuantizedLinear

MAGNITUDE, BIAS = "lora_magnitude_vector", "lora_B.bias"


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the model.

    Attributes:
        update, keys: a low-rank update, and the tensors of the adapter's file that belong to it.
        num_experts: of a fused expert weight, which has an update for each; else None.
        transposed: the tensor lies as (in, out).
        tokens: ids of the rows that are replaced by those of the one tensor of the file.
        replaced: the tensor of the adapter's file that takes the place of the base's.
    """

    found: AdapterFile = field(repr=False)
    update: Update | None = None
    keys: tuple[AdapterKey, ...] = ()
    num_experts: int | None = None
    transposed: bool = False
    tokens: tuple[int, ...] = ()
    replaced: AdapterKey | None = None

    def parts(self) -> dict[str, Tensor]:
        """The update's tensors by their names in a file."""
        return {key.part: self.found.read(key) for key in self.keys}

    def value(self) -> Tensor:
        """What takes the tensor's place."""
        assert self.replaced is not None
        return self.found.read(self.replaced)

    def run(self, shape: tuple[int, ...], offset: int) -> Rows:
        """What takes the place of a part of the tensor, by rows that are read when they are asked for.

        Args:
            shape: of the part.
            offset: the element of the tensor that it begins with.
        """
        assert self.replaced is not None
        entry, size = self.found.entries[self.replaced], math.prod(shape[1:])

        def read(start: int, stop: int) -> Tensor:
            try:
                rows = entry.read(offset + start * size, offset + stop * size).reshape(-1, *shape[1:]).to(torch.float32)
            except BaseModelError as error:
                raise AdapterError(error.message, place=error.place) from error
            if not torch.isfinite(rows).all():
                raise AdapterError(f"{entry.name} holds values that are not finite", place=str(entry.file))
            return rows

        return Rows(shape, read)

    def is_as(self, other: Change | None) -> bool:
        """Whether both do the same. Reads what takes the place of a tensor."""
        if other is None or self.replaced is None or other.replaced is None:
            return other is not None and (self.keys, self.replaced) == (other.keys, other.replaced)
        return torch.equal(self.value(), other.value())


def changes_of(model: nn.Module, found: AdapterFile) -> dict[str, Change]:
    """What an adapter does, by parameter of the model. Raises AdapterError where it does not fit."""
    wrong: list[str] = []
    changes: dict[str, Change] = {}
    for path in dict.fromkeys(key.path for key in found.entries):
        try:
            module: Any = module_at(model, path)
        except AttributeError:
            wrong.append(f"{path}: the base has no such module")
            continue
        own = [key for key in found.entries if key.path == path]
        update = tuple(key for key in own if key.is_of_update)
        if update:
            wrong += _add_update(changes, module, update, found)
        for key in own:
            if key.part == ROWS:
                wrong += _add_rows(changes, module, key, found)
            if not key.is_of_whole:
                continue
            name = f"{path}.{key.part}"
            parameter = dict(module.named_parameters(recurse=False)).get(key.part)
            shape = found.entries[key].shape
            if name in changes:
                wrong.append(f"{path}: both adapted and trained as a whole")
            elif parameter is None or _whole_shape(module, key.part) != shape:
                wanted = None if parameter is None else _whole_shape(module, key.part)
                wrong.append(f"{name} has shape {shape}, this base needs {wanted or 'none of that name'}")
            changes[name] = Change(found, replaced=key)
    refuse(wrong, f"{len(wrong)} tensors do not fit the base", found.folder / WEIGHTS_NAME)
    return changes


def _whole_shape(module: Any, part: str) -> tuple[int, ...]:
    if isinstance(module, QuantizedLinear) and part == "weight":
        return (module.out_features, module.in_features)
    return tuple(module.get_parameter(part).shape)


def _add_update(changes: dict[str, Change], module: Any, keys: tuple[AdapterKey, ...], found: AdapterFile) -> list[str]:
    """Record a layer's update. Returns what does not fit."""
    path = keys[0].path
    kind = kind_of(module)
    if kind is None:
        return [f"{path}: {type(module).__name__} cannot carry {keys[0].part}"]
    update = Update.of(found.config.to_lora_config([path], "float32"), path)
    try:
        shapes = kind.shapes(module, update)
    except ConfigError as error:
        return [f"{path}: {error.message}"]
    wrong = [f"{path}: the file has no {part}" for part in shapes if AdapterKey(path, part) not in keys]
    for key in keys:
        shape, wanted = found.entries[key].shape, shapes.get(key.part)
        if shape != wanted:
            wrong.append(f"{key.in_file()} has shape {shape}, this base needs {wanted or 'none of that name'}")
    own = tuple(key for key in keys if key.part != BIAS)
    if isinstance(module, ExpertWeight):
        changes[path] = Change(found, update, own, module.sizes[0], module.is_transposed)
        return wrong
    if getattr(module, "groups", 1) > 1:
        raise AdapterError(
            "the update of a convolution of several groups connects what its weight keeps apart, so that it holds no sum",
            place=f"{found.folder / WEIGHTS_NAME}: {path}",
            found=f"{module.groups} groups",
            next_step="keep the adapter beside the base",
        )
    changes[f"{path}.weight"] = Change(found, update, own, transposed=is_conv1d(module))
    bias = tuple(key for key in keys if key.part == BIAS)
    if bias and module.bias is None:
        raise AdapterError(
            "the adapter has a bias for a layer that has none, and the base's architecture has no place for one",
            place=f"{found.folder / WEIGHTS_NAME}: {path}",
            found=f"{BIAS} for a {type(module).__name__} without a bias",
            next_step="keep the adapter beside the base, or train without lora.lora_bias",
        )
    if bias:
        changes[f"{path}.bias"] = Change(found, update, bias)
    return wrong


def _add_rows(changes: dict[str, Change], module: Any, key: AdapterKey, found: AdapterFile) -> list[str]:
    """Record rows of tokens. Returns what does not fit."""
    name, ids = f"{key.path}.weight", found.token_rows[key.path]
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    shape = found.entries[key].shape
    if name in changes:
        return [f"{key.path}: adapted, and rows of it are trained as well"]
    if weight is None or isinstance(module, QuantizedLinear) or weight.ndim != 2:
        return [f"{key.path}: {type(module).__name__} has no rows of tokens"]
    if shape != (len(ids), weight.shape[1]):
        return [f"{key.in_file()} has shape {shape}, the config and this base need {(len(ids), weight.shape[1])}"]
    beyond = sorted(token for token in ids if token >= len(weight))
    if len(set(ids)) < len(ids) or beyond != list(range(len(weight), len(weight) + len(beyond))):
        return [f"{key.path}: token ids are given twice, or leave rows out behind the base's {len(weight)}"]
    changes[name] = Change(found, keys=(key,), tokens=ids)
    return []


def changed(rows: Rows, change: Change, *, transposed: bool = False, offset: int = 0) -> Rows:
    """What a change makes of a tensor. Reads the tensors of an update whole.

    Args:
        rows: of the tensor, or of a part of one, where it is replaced or has an update for each expert.
        transposed: the tensor lies as (in, out).
        offset: the element of the tensor that the part begins with.
    """
    if change.replaced is not None:
        return change.run(rows.shape, offset)
    parts = change.parts()
    if change.tokens:
        return with_rows(rows, torch.tensor(change.tokens), parts[ROWS])
    assert change.update is not None
    scaling = change.update.scaling
    if BIAS in parts:
        return plus_vector(rows, parts[BIAS], scaling)
    if change.num_experts is not None:
        A, B = parts["lora_A.weight"], parts["lora_B.weight"]
        blocks = as_matrix(rows) if len(rows.shape) > 2 else rows
        update = LowRank.of_experts(A, B, change.num_experts, scaling, transposed=transposed)
        return plus(blocks, update, offset=offset // blocks.shape[1])
    by_columns = ("lora_embedding_A" in parts) != transposed
    rows = plus(rows, LowRank.of_parts(parts, scaling, transposed=transposed))
    return with_magnitude(rows, parts[MAGNITUDE], of_columns=by_columns) if MAGNITUDE in parts else rows
