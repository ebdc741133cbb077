"""Whether an adapter's files fit a model: everything that could fail later, found before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.adapter.config_file import AdapterConfig
from qlora.adapter.keys import BASE, AdapterKey
from qlora.adapter.new_tokens import check_tokens
from qlora.adapter.read import WEIGHTS_NAME, AdapterFile, refuse
from qlora.adapter.residual import check_initial
from qlora.distributed.collectives import is_partitioned, whole_parameters, whole_shape
from qlora.errors import AdapterError, ConfigError, QloraError
from qlora.lora.expert_paths import fused_weights, module_at
from qlora.lora.inject import base_of, list_candidates
from qlora.lora.kinds import kind_of
from qlora.lora.layer import lora_layers
from qlora.lora.starts import initial_factors
from qlora.lora.token_rows import ROWS, check_rows
from qlora.lora.update import Update
from qlora.quant.load import BaseRecord
from qlora.quant.source import fingerprints_of


def check_fit(model: nn.Module, found: AdapterFile, other_base: bool = False) -> None:
    """Compare an adapter's names and shapes with a model. Changes nothing.

    Rank-local; collective where the files hold a copy of a weight that the model keeps in shares.

    Args:
        other_base: an adapter of another base is welcome.

    Raises:
        AdapterError: it was trained on another base, has modules or tensors that the model has no place for, lacks some,
            or has other shapes; all that is wrong is named. Also one with other new tokens, see `new_tokens.check_tokens`.
    """
    file = found.folder / WEIGHTS_NAME
    _check_base(model, found, other_base)
    check_initial(found.initial, initial_factors(model), str(file))
    check_tokens(model, found)
    if not found.targeted and not found.trained and not found.token_rows:
        raise AdapterError("the adapter would change nothing", place=str(file))
    # Inside of a LoRA layer there is no module of the base, and a module that is shared has one path.
    paths = {candidate.path for candidate in list_candidates(model)[0]} | set(fused_weights(model))
    held = list(dict.fromkeys(key.path for key in found.entries))
    wrong = [f"{path}: the model has no such module" for path in held if path not in paths]
    if len(wrong) == len(held):
        refuse(wrong, f"none of the adapter's {len(held)} modules is in the model", file, "give the base it was trained on")
    wrong += [f"{path}: both adapted and trained as a whole" for path in found.targeted if path in found.trained]
    for key, entry in found.entries.items():
        if key.path not in paths:
            continue
        module: Any = module_at(model, key.path)
        try:
            wanted = _wanted_shape(module, key, found.config)
        except ConfigError as error:
            wrong.append(f"{key.in_file()}: {error.message}")
            continue
        if wanted is None:
            wrong.append(f"{key.path}: {type(base_of(module)).__name__} cannot carry {key.part} here")
        elif wanted != entry.shape:
            wrong.append(f"{key.in_file()} has shape {entry.shape}, this base needs {wanted}")
        elif key.part == BASE and not _is_base_weight(module, found, key):
            wrong.append(f"{key.path}: the base weight beside the adapter is not this base's")
    wrong += _rows_that_do_not_fit(model, found, paths)
    wrong += _missing(model, found, paths)
    wrong += _untied(model, found)
    refuse(wrong, f"{len(wrong)} tensors do not fit the model", file)
    refuse_prepared(model, found)


def is_prepared(model: nn.Module) -> bool:
    """Whether the adapters' own parameters are in shares."""
    return any(
        is_partitioned(p) for _, layer in lora_layers(model) for own in layer.updates for p in layer.parts(own).values()
    )


def refuse_prepared(model: nn.Module, found: AdapterFile) -> None:
    """Raise AdapterError where the model is prepared already."""
    if is_prepared(model):
        raise AdapterError("adapters are loaded before the model is prepared", place=str(found.folder / WEIGHTS_NAME))


def _check_base(model: nn.Module, found: AdapterFile, other_base: bool) -> None:
    base: BaseRecord | None = model.__dict__.get("qlora_base")
    recorded = found.described.get("base") or {}
    theirs, ours = fingerprints_of(recorded), fingerprints_of(base.source.record()) if base else set()
    if base and theirs and ours and not theirs & ours and not other_base:
        raise AdapterError(
            "the adapter was trained on another base",
            place=str(found.folder / WEIGHTS_NAME),
            found=f"{recorded['name']} ({str(recorded.get('fingerprint'))[:12]})",
            wanted=f"{base.source.name} ({str(base.source.fingerprint)[:12]})",
            next_step="give the base it was trained on (in Python other_base=True loads it all the same)",
        )


def _is_base_weight(module: Any, found: AdapterFile, key: AdapterKey) -> bool:
    """Whether a copy of the base's weight in the file is that of this base, in its dtype."""
    own = whole_parameters({"": module.weight})[""]
    return torch.equal(own, found.read(key).to(own.dtype))


def _wanted_shape(module: Any, key: AdapterKey, config: AdapterConfig) -> tuple[int, ...] | None:
    """The shape a tensor must have here, or None where the module has no place for it."""
    if key.is_of_update:
        return _wanted_parts(module, key.path, config).get(key.part)
    if key.part == ROWS:
        weight, ids = getattr(module, "weight", None), config.ids_of(key.path, Path())
        return (len(ids), whole_shape(weight)[-1]) if isinstance(weight, nn.Parameter) else None
    if key.part == BASE:
        weight = getattr(module, "weight", None)
        return whole_shape(weight) if isinstance(weight, nn.Parameter) else None
    parameter = dict(module.named_parameters(recurse=False)).get(key.part)
    return None if parameter is None or not parameter.is_floating_point() else whole_shape(parameter)


def _rows_that_do_not_fit(model: nn.Module, found: AdapterFile, paths: set[str]) -> list[str]:
    """What forbids the rows of tokens that a file holds."""
    try:
        rows = {path: ids for path, ids in found.token_rows.items() if path in paths}
        check_rows(model, rows, found.targeted, found.trained)
    except QloraError as error:
        return [f"{error.message} ({error.found})"]
    return []


def _wanted_parts(module: nn.Module, path: str, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what an update of a module consists of; none where it can have none. Raises ConfigError."""
    kind = kind_of(module)
    if kind is None:
        return {}
    return kind.shapes(base_of(module), Update.of(config.to_lora_config([path], "float32"), path))


def _missing(model: nn.Module, found: AdapterFile, paths: set[str]) -> list[str]:
    """What an update needs by the config, and the file does not hold."""
    wrong = []
    for path in found.targeted:
        if path in paths:
            try:
                parts = _wanted_parts(module_at(model, path), path, found.config)
            except ConfigError:
                continue  # told with the tensors themselves
            wrong += [f"{path}: the file has no {part}" for part in parts if AdapterKey(path, part) not in found.entries]
    return wrong


def _untied(model: nn.Module, found: AdapterFile) -> list[str]:
    """What a file says of one side of a tied weight alone, or differently of both: here both are one tensor."""
    sharers: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sharers.setdefault(id(parameter), []).append(name)
    held = {f"{key.path}.{key.part}": key for key in found.entries if key.path in found.trained}
    wrong = []
    for names in sharers.values():
        here = [name for name in names if name in held]
        if len(names) == 1 or not here:
            continue
        if len(here) < len(names) and not found.config.ties_weights:
            wrong.append(f"{here[0]}: this base ties it to {next(n for n in names if n not in here)}, the adapter does not")
        elif any(not torch.equal(found.read(held[here[0]]), found.read(held[name])) for name in here[1:]):
            wrong.append(f"{here[0]}: this base ties it to {here[1]}, and the adapter holds another value for each")
    return wrong
