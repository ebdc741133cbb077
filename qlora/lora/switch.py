"""Choosing among the adapters of one model: for all of it, or row by row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import AdapterError
from qlora.lora.experts import LoraExpertWeight
from qlora.lora.inject import AdapterRecord, activate
from qlora.lora.layer import LoraLayer, lora_layers, refuse_by_row, refuse_merged
from qlora.lora.starts import refuse_changed_base


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter of a model the active one, and it alone trainable; None leaves the base alone. Rank-local.

    What is not active costs its memory and nothing else: a layer computes with the active update only.

    Raises:
        AdapterError: there is no such adapter, one is merged, or `adapters_by_row` is in force.
    """
    records: dict[str, AdapterRecord] = model.__dict__.get("qlora_adapters", {})
    if name is not None and name not in records:
        raise AdapterError(f"the model has no adapter {name!r}", found=sorted(records) or "none at all")
    refuse_by_row(model)
    refuse_merged(model)
    if name is None:
        refuse_changed_base(model, "it computes nothing sensible alone")
    whole = next((own for own, record in records.items() if record.trained and own != name), None)
    if whole is not None:
        raise AdapterError(
            f"the adapter {whole!r} trained modules as wholes, which have taken the place of the base's own",
            next_step="use one model for each",
        )
    activate(model, "" if name is None else name, records[name].trained if name is not None else ())


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside, row i of every batch is computed with the adapter names[i]; None is the base. For inference.

    A linear layer multiplies all rows with the frozen weight once and adds each adapter's part to its rows, so that the
    price over one adapter is some small products a layer. Layers of other kinds compute each adapter's rows apart. With
    `disable_adapter`, inside or around, every row is the base's.

    Args:
        names: one for each row that a forward pass is given. Generation with several sequences a prompt has more rows.

    Raises:
        AdapterError: names that are no list, an adapter that is not there, that is merged, or that trained modules as
            wholes, or a second of these contexts; inside, a batch with another number of rows, or gradients.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise AdapterError("adapters by row are a list", found=repr(names), wanted="one name, or None, for each row")
    records: dict[str, AdapterRecord] = model.__dict__.get("qlora_adapters", {})
    for name in names:
        if name is not None and name not in records:
            raise AdapterError(f"the model has no adapter {name!r}", found=sorted(records) or "none at all")
    whole = next((own for own, record in records.items() if record.trained), None)
    if whole is not None:
        raise AdapterError(f"the adapter {whole!r} trained modules as wholes, which are the same for every row")
    refuse_by_row(model)
    refuse_merged(model)
    if None in names:
        refuse_changed_base(model, "it computes nothing sensible alone")
    fused = next((path for path, layer in lora_layers(model) if isinstance(layer, LoraExpertWeight)), None)
    if fused is not None:
        raise AdapterError(
            "fused experts are not told which row a token is of", place=fused, next_step="compute each adapter's rows apart"
        )
    rows = {name: torch.tensor([i for i, own in enumerate(names) if own == name]) for name in dict.fromkeys(names)}
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.active_adapter for layer in layers]
    for layer in layers:
        # On the instance: whatever calls the layer finds it, and the class stays as it is.
        layer.forward = partial(_forward, layer, rows, len(names))
        layer.by_row = True
    try:
        yield model
    finally:
        for layer, active in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            layer.by_row = False
            layer.active_adapter = active


def _forward(layer: Any, rows: dict[str | None, Tensor], num_rows: int, x: Tensor) -> Tensor:
    """A layer's output (rows, ..., out) with every row's own adapter."""
    if torch.is_grad_enabled():
        raise AdapterError("adapters by row are for inference", next_step="use torch.no_grad() or torch.inference_mode()")
    if x.shape[0] != num_rows:
        raise AdapterError(
            "the batch has another number of rows than adapters were named for", found=x.shape[0], wanted=num_rows
        )
    compute = partial(type(layer).forward, layer)
    if not layer.enabled:
        return compute(x)
    if not layer.adds_to_base(rows):
        found = {name: _with(layer, name, compute, x[index.to(x.device)]) for name, index in rows.items()}
        first = next(iter(found.values()))
        out = first.new_empty(num_rows, *first.shape[1:])
        for name, index in rows.items():
            out[index.to(x.device)] = found[name]
        return out
    out = _with(layer, None, compute, x)
    for name, index in rows.items():
        if name in layer.updates:
            index = index.to(x.device)
            out.index_add_(0, index, layer.low_rank(name, x[index]).to(out.dtype))
    return out


def _with(layer: LoraLayer, name: str | None, compute: Any, x: Tensor) -> Tensor:
    layer.active_adapter = name if name in layer.updates else None
    return compute(x)
