"""Loading an adapter only where it fits; a load that fails changes nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapter.expert_keys import in_model
from qlora.adapter.fit import check_fit, is_prepared, refuse_prepared
from qlora.adapter.new_tokens import KEPT, tokens_kept
from qlora.adapter.read import AdapterFile, open_adapter
from qlora.adapter.save import adapter_record
from qlora.distributed.collectives import set_whole
from qlora.errors import AdapterError
from qlora.lora.inject import (
    AdapterRecord,
    activate,
    check_can_add,
    take_over_bitsandbytes,
    unwrap_empty,
    without_layers_of,
    wrap,
)
from qlora.lora.layer import LoraLayer, refuse_by_row
from qlora.lora.starts import refuse_changed_base
from qlora.lora.token_rows import ROWS, add_token_rows, remove_token_rows


def load_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, replace: bool = False, other_base: bool = False
) -> AdapterFile:
    """Put an adapter from files into a model and make it active. A load that fails changes nothing.

    Rank-local; where the base is kept in shares every rank calls it.

    Args:
        model: with or without LoRA layers; they are put where the adapter's tensors say.
        replace: put it in the place of an adapter of this name, which may have had other layers.
        other_base: load although the adapter was trained on another base.

    Raises:
        AdapterError: the name is taken or none, the files cannot be used (see `read.open_adapter`) or do not fit the model
            (see `fit.check_fit`), a value is not finite, or see `lora.inject.check_can_add`.
    """
    found = in_model(model, open_adapter(folder))
    adapters: dict[str, AdapterRecord] = model.__dict__.get("qlora_adapters", {})
    if name in adapters and not replace:
        raise AdapterError(f"the model has an adapter {name!r} already", next_step="pass replace=True, or another name")
    refuse_prepared(model, found)
    with without_layers_of(model, name):
        check_fit(model, found, other_base)
    check_can_add(model, name, found.trained)
    lost = set(adapters[name].trained) - set(found.trained) if name in adapters else set()
    if lost:
        raise AdapterError(
            "the adapter to be replaced has trained modules as wholes, and their old values are gone",
            place=str(found.folder),
            found=", ".join(sorted(lost)[:5]),
            next_step="load the base again",
        )
    dtypes = {entry.dtype for key, entry in found.entries.items() if key.is_of_update}
    config = found.config.to_lora_config(found.targeted, "bfloat16" if dtypes == {torch.bfloat16} else "float32")
    tensors, kept = found.read_all(), tokens_kept(model, found)
    if name in adapters:
        _forget(model, name)
        unwrap_empty(model, keep=found.targeted)
    take_over_bitsandbytes(model)
    updates: dict[str, dict[str, Tensor]] = {path: {} for path in found.targeted}
    for key, value in tensors.items():
        if key.is_of_update:
            updates[key.path][key.part] = value
    for path, values in updates.items():
        wrap(model, path).add_adapter(name, config, path, seed=0, values=values)
    trained, rows = found.trained, found.token_rows
    values = {key.path: value for key, value in tensors.items() if key.part == ROWS}
    add_token_rows(model, rows, name, getattr(torch, config.dtype), values)
    activate(model, name, trained)
    for key, value in tensors.items():
        if key.path in trained and key.is_of_whole:
            set_whole(model.get_submodule(key.path).get_parameter(key.part), value)
    record = AdapterRecord(config.model_copy(update=found.config.selection), tuple(found.targeted), tuple(trained), rows)
    model.__dict__.setdefault("qlora_adapters", {})[name] = record
    model.__dict__.setdefault(KEPT, {})[name] = kept
    return found


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter, and the layers that no other has. Where it was the active one, the base alone is left.

    Raises:
        AdapterError: there is none of that name, `adapters_by_row` is in force, or it has trained modules as wholes, whose
            old values are gone.
    """
    record = adapter_record(model, name)
    if record.trained:
        raise AdapterError(
            "the adapter has trained modules as wholes, and their old values are gone",
            found=", ".join(record.trained[:5]),
            next_step="load the base again",
        )
    refuse_changed_base(model, "without the adapter it computes nothing sensible")
    refuse_by_row(model)
    prepared = is_prepared(model)
    _forget(model, name)
    if not prepared:  # what gathers shares hangs on the layers
        unwrap_empty(model)


def _forget(model: nn.Module, name: str) -> None:
    record = adapter_record(model, name)
    for path in record.targeted:
        layer = model.get_submodule(path)
        if isinstance(layer, LoraLayer) and name in layer.updates:
            layer.remove_adapter(name)
    remove_token_rows(model, record.token_rows, name)
    del model.__dict__["qlora_adapters"][name]
    model.__dict__.get(KEPT, {}).pop(name, None)
