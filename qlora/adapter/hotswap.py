"""Other weights into an adapter that is there: the same parameters, so that nothing that holds them has to know.

A compiled model is not compiled again, a captured graph stays valid. Scalings are numbers inside of such graphs; where the
new adapter has another one, B takes the difference up.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapter.expert_keys import in_model
from qlora.adapter.files import AdapterFile, adapter_record, check_fit, open_adapter
from qlora.errors import AdapterError
from qlora.lora.layer import LoraLayer, refuse_merged
from qlora.lora.update import Update


def hotswap_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, other_base: bool = False) -> AdapterFile:
    """Put the values of an adapter's files into an adapter that the model has. Rank-local.

    The files' ranks may be smaller (A and B are filled up with zeros), and they may leave layers out (B is zero there).

    Raises:
        AdapterError: the files do not fit the model, see `load_adapter`; they adapt a layer that the adapter in the model
            does not, or with a larger rank or another variant; modules trained as wholes; an adapter is merged. Nothing
            is changed then.
    """
    found = in_model(model, open_adapter(folder))
    record = adapter_record(model, name)
    refuse_merged(model)
    check_fit(model, found, other_base)
    if record.trained or found.trained:
        raise AdapterError("modules trained as wholes cannot be swapped", place=str(folder), next_step="load the adapter")
    if record.token_rows or found.token_rows:
        raise AdapterError("trained rows of tokens cannot be swapped", place=str(folder), next_step="load the adapter")
    beyond = sorted(set(found.targeted) - set(record.targeted))
    if beyond:
        raise AdapterError(
            f"the adapter {name!r} in the model does not adapt {len(beyond)} layers that the files do",
            place=str(folder),
            found=", ".join(beyond[:5]),
            next_step="load it under a name of its own",
        )
    tensors: dict[str, dict[str, Tensor]] = {path: {} for path in record.targeted}
    for key in found.entries:
        if key.is_of_update:
            tensors[key.path][key.part] = found.read(key)
    updates = {path: Update.of(found.config.to_lora_config([path], "float32"), path) for path in found.targeted}
    layers: dict[str, LoraLayer] = {}
    for path in record.targeted:
        layer = model.get_submodule(path)
        assert isinstance(layer, LoraLayer)
        layers[path] = layer
        _check(path, layer, name, updates.get(path), str(folder))
    for path, layer in layers.items():
        _swap(layer, name, updates.get(path), tensors[path])
    return found


def _check(path: str, layer: LoraLayer, name: str, new: Update | None, place: str) -> None:
    there = layer.updates[name]
    if there.use_dora and (new is None or not new.use_dora):
        raise AdapterError("the adapter in the model is DoRA, and the files' is not", place=place, found=path)
    if new is None:
        return
    for variant in ("use_dora", "lora_bias"):
        if getattr(new, variant) and not getattr(there, variant):
            raise AdapterError(f"the files have {variant}, and the adapter in the model has not", place=place, found=path)
    if new.r > there.r:
        raise AdapterError(
            "the files have a larger rank than the adapter in the model",
            place=place,
            found=f"{path}: {new.r}",
            wanted=there.r,
        )
    if new.r != there.r and layer.to_factors(name)[0].shape[0] > 1:
        raise AdapterError("adapters of experts are swapped at equal rank alone", place=place, found=new.r, wanted=there.r)


@torch.no_grad()
def _swap(layer: LoraLayer, name: str, new: Update | None, tensors: dict[str, Tensor]) -> None:
    part_A, part_B = list(layer.TABLES)[:2]
    for part, parameter in layer.parts(name).items():
        value = tensors.get(part)
        if new is None or value is None:
            parameter.zero_()
            continue
        value = value.to(device=parameter.device, dtype=torch.promote_types(value.dtype, torch.float32))
        if part in (part_B, "lora_B.bias"):
            value = value * (new.scaling / layer.updates[name].scaling)
        if value.shape == parameter.shape:
            parameter.copy_(value)
            continue
        parameter.zero_()
        dim = 0 if part == part_A else 1
        parameter.narrow(dim, 0, value.shape[dim]).copy_(value)
