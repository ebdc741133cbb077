"""Adapter files: saving what was trained and nothing else, loading it only where it fits.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them; the same state gives the same
bytes from every kind of sharding. What PEFT has no field for (the base's fingerprint, how it was quantized) is in the
safetensors metadata, where other readers do not look.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from qlora.adapter import config_file
from qlora.adapter.keys import AdapterKey, parse_key
from qlora.distributed.collectives import is_partitioned, set_whole, whole_parameters, whole_shape
from qlora.errors import AdapterError, BaseModelError
from qlora.files import write_file
from qlora.lora.inject import (
    AdapterRecord,
    activate,
    check_can_add,
    is_supported,
    list_candidates,
    take_over_bitsandbytes,
    wrap,
)
from qlora.lora.layer import LoraLayer, lora_layers
from qlora.quant import shards
from qlora.quant.load import BaseRecord
from qlora.quant.source import fingerprints_of

WEIGHTS_NAME = "adapter_model.safetensors"
METADATA_KEY = "qlora"
TEMPLATE_NAME = "chat_template.jinja"


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one adapter by their keys in a file, sorted. Rank-local."""
    record = adapter_record(model, name)
    found: dict[str, nn.Parameter] = {}
    for path in record.targeted:
        layer: Any = model.get_submodule(path)
        for part, table in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            found[AdapterKey(path, part).in_file()] = table[name]
    for path in record.trained:
        for part, parameter in model.get_submodule(path).named_parameters(recurse=False):
            found[AdapterKey(path, part).in_file()] = parameter
    return dict(sorted(found.items()))


def adapter_record(model: nn.Module, name: str) -> AdapterRecord:
    """What is known of one adapter of a model. Raises AdapterError where there is none of that name."""
    adapters: dict[str, AdapterRecord] = model.__dict__.get("qlora_adapters", {})
    if name not in adapters:
        raise AdapterError(f"the model has no adapter {name!r}", found=sorted(adapters) or "none at all")
    return adapters[name]


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, write: bool = True) -> Path:
    """Write an adapter's two files. Collective under ZeRO-3: every rank calls it, with `write` on one alone.

    Raises:
        AdapterError: no such adapter, or a tensor came out empty or not finite; nothing is written then.
    """
    folder = Path(folder)
    state = whole_parameters(adapter_parameters(model, name), keep=write)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, content in render_files(model, state, name).items():
            write_file(folder / file_name, content)
    return folder


def render_files(model: nn.Module, state: dict[str, Tensor], name: str = "default") -> dict[str, bytes]:
    """The content of an adapter's files by file name. Raises AdapterError where a tensor is empty or not finite.

    A model that was trained with a chat template other than its tokenizer's (`qlora_chat_template`) takes it along.
    """
    for key, value in state.items():
        if value.numel() == 0:
            raise AdapterError(f"{key} is empty: it was not gathered from its shares", next_step="report this as a bug")
        if not torch.isfinite(value).all():
            raise AdapterError(f"{key} holds values that are not finite, so the adapter was not written")
    record = adapter_record(model, name)
    base: BaseRecord | None = model.__dict__.get("qlora_base")
    candidates, _ = list_candidates(model)
    config = config_file.render(
        record.config,
        targeted=record.targeted,
        trained=record.trained,
        all_paths=[candidate.path for candidate in candidates],
        base=base.source.name if base else None,
        revision=base.source.revision if base else None,
        task_type="CAUSAL_LM" if hasattr(model, "generate") else None,
    )
    # Tied parameters that are trained are one tensor under two keys; a file may not alias.
    tensors = {key: value.clone() for key, value in state.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(_describe_base(base), sort_keys=True)}
    files = {WEIGHTS_NAME: _weights_file(tensors, metadata), config_file.CONFIG_NAME: config.encode()}
    template: str | None = model.__dict__.get("qlora_chat_template")
    if template is not None:
        files[TEMPLATE_NAME] = template.encode()
    return files


def _weights_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone: the library's order of metadata changes with each call."""
    plain = safetensors_bytes(tensors)
    data_at = 8 + int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(plain[8:data_at])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors to begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + plain[data_at:]


def _describe_base(base: BaseRecord | None) -> dict[str, Any]:
    if base is None:
        return {}
    return {
        "base": base.source.record(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": base.quantization.model_dump() if base.quantization else None,
    }


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk whose names, shapes and config have been checked, with no tensor read yet.

    Attributes:
        entries: where each tensor lies.
        described: what this project recorded of the base ({} for a file of PEFT's).
    """

    folder: Path
    config: config_file.AdapterConfig
    entries: dict[AdapterKey, shards.TensorEntry] = field(repr=False)
    described: dict[str, Any]

    @property
    def targeted(self) -> list[str]:
        """Paths of the layers it adapts."""
        return [key.path for key in self.entries if key.part == "lora_A"]

    @property
    def modules(self) -> set[str]:
        """Paths of the modules it holds anything for, and of what they are in."""
        parts = [key.path.split(".") for key in self.entries]
        return {".".join(names[:end]) for names in parts for end in range(1, len(names) + 1)}

    @property
    def trained(self) -> list[str]:
        """Paths of the modules it replaces as wholes."""
        lora = {"lora_A", "lora_B", "base"}
        return list(dict.fromkeys(key.path for key in self.entries if key.part not in lora))


def open_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter's config and header. Rank-local.

    Raises:
        AdapterError: files missing, damaged or of pickle kind, a tensor without its partner, or none at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError("no such folder", place=str(folder), wanted="an adapter or checkpoint folder")
    config = config_file.read(folder)
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            f"no {WEIGHTS_NAME}",
            place=str(folder),
            found="adapter_model.bin, a pickle file, which is never opened" if pickled else None,
            next_step="save the adapter again with safetensors" if pickled else None,
        )
    if file.resolve().parent != folder.resolve():
        raise AdapterError("the weights are a link out of the adapter's folder", place=str(file))
    try:
        header, metadata = shards.read_header_and_metadata(file)
        described = json.loads(metadata.get(METADATA_KEY, "{}"))
        if not isinstance(described, dict):
            raise TypeError("not a table")
    except BaseModelError as error:
        raise AdapterError(error.message, place=error.place, found=error.found, wanted=error.wanted) from error
    except (ValueError, TypeError) as error:
        raise AdapterError(f"damaged metadata: {error}", place=str(file)) from error
    entries = {parse_key(key, str(file)): entry for key, entry in header.items()}
    pairs = {part: {key.path for key in entries if key.part == part} for part in ("lora_A", "lora_B")}
    alone = sorted(pairs["lora_A"] ^ pairs["lora_B"])
    if alone:
        raise AdapterError(f"{len(alone)} layers have only one of A and B", place=str(file), found=", ".join(alone[:5]))
    if not entries or any(entry.num_elements == 0 for entry in entries.values()):
        raise AdapterError(
            "the adapter is empty", place=str(file), next_step="it was saved from shares without gathering; train again"
        )
    found = AdapterFile(folder, config, entries, described)
    absent = [name for name in config.modules_to_save if not any(path.endswith(name) for path in found.modules)]
    if absent:
        raise AdapterError(
            "modules_to_save names modules of which the file holds nothing", place=str(file), found=", ".join(absent)
        )
    return found


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
        AdapterError: the name is taken or none, a layer is missing or of another shape, the adapter is another base's, or
            see `lora.inject.check_can_add`.
    """
    found = open_adapter(folder)
    adapters: dict[str, AdapterRecord] = model.__dict__.setdefault("qlora_adapters", {})
    if name in adapters and not replace:
        raise AdapterError(f"the model has an adapter {name!r} already", next_step="pass replace=True, or another name")
    _check_fit(model, found, other_base)
    check_can_add(model, name, found.trained)
    lost = set(adapters[name].trained) - set(found.trained) if name in adapters else set()
    if lost:
        raise AdapterError(
            "the adapter to be replaced has trained modules as wholes, and their old values are gone",
            place=str(found.folder),
            found=", ".join(sorted(lost)[:5]),
            next_step="load the base again",
        )
    dtypes = {entry.dtype for key, entry in found.entries.items() if key.part == "lora_A"}
    dtype = "bfloat16" if dtypes == {torch.bfloat16} else "float32"
    config = found.config.to_lora_config(found.targeted, dtype)
    tensors = {key: entry.read_whole() for key, entry in found.entries.items()}
    if name in adapters:
        _forget(model, name)
    take_over_bitsandbytes(model)
    for path in found.targeted:
        layer = wrap(model, path)
        layer.add_adapter(name, config, path, seed=0)
        set_whole(layer.lora_A[name], tensors[AdapterKey(path, "lora_A")])
        set_whole(layer.lora_B[name], tensors[AdapterKey(path, "lora_B")])
    trained = found.trained
    activate(model, name, trained)
    for key, value in tensors.items():
        if key.path in trained:
            set_whole(model.get_submodule(key.path).get_parameter(key.part), value)
    adapters[name] = AdapterRecord(config, tuple(found.targeted), tuple(trained))
    return found


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; the layers stay for others. Where it was the active one, the base alone is left.

    Raises:
        AdapterError: there is none of that name, or it has trained modules as wholes, whose old values are gone.
    """
    record = adapter_record(model, name)
    if record.trained:
        raise AdapterError(
            "the adapter has trained modules as wholes, and their old values are gone",
            found=", ".join(record.trained[:5]),
            next_step="load the base again",
        )
    _forget(model, name)


def _forget(model: nn.Module, name: str) -> None:
    record = adapter_record(model, name)
    for path in record.targeted:
        layer = model.get_submodule(path)
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            layer.remove_adapter(name)
    del model.__dict__["qlora_adapters"][name]


def _check_fit(model: nn.Module, found: AdapterFile, other_base: bool) -> None:
    """Everything that could fail later, before anything is changed."""
    place = str(found.folder / WEIGHTS_NAME)
    base: BaseRecord | None = model.__dict__.get("qlora_base")
    recorded = found.described.get("base") or {}
    theirs, ours = fingerprints_of(recorded), fingerprints_of(base.source.record()) if base else set()
    if base and theirs and ours and not theirs & ours and not other_base:
        raise AdapterError(
            "the adapter was trained on another base",
            place=place,
            found=f"{recorded['name']} ({str(recorded.get('fingerprint'))[:12]})",
            wanted=f"{base.source.name} ({str(base.source.fingerprint)[:12]})",
            next_step="give the base it was trained on (in Python other_base=True loads it all the same)",
        )
    if not found.targeted and not found.trained:
        raise AdapterError("the adapter would change nothing", place=place)
    wrong = []
    for key, entry in found.entries.items():
        try:
            module: Any = model.get_submodule(key.path)
        except AttributeError:
            wrong.append(f"{key.path}: the model has no such module")
            continue
        wanted = _wanted_shape(module, key, found.config.r)
        if wanted is None:
            wrong.append(f"{key.path}: {type(module).__name__} cannot carry {key.part}")
        elif wanted != entry.shape:
            wrong.append(f"{key.in_file()} has shape {entry.shape}, this base needs {wanted}")
        elif key.part == "base" and not torch.equal(
            whole_parameters({"": module.weight})[""], entry.read_whole().to(module.weight.dtype)
        ):
            wrong.append(f"{key.path}: the base weight beside the adapter is not this base's")
    wrong += _untied(model, found)
    if wrong:
        shown = "\n         ".join(wrong[:5])
        raise AdapterError(f"{len(wrong)} tensors do not fit the model", place=place, found=shown)
    if any(is_partitioned(p) for _, layer in lora_layers(model) for p in layer.lora_A.values()):
        raise AdapterError("adapters are loaded before the model is prepared", place=place)


def _untied(model: nn.Module, found: AdapterFile) -> list[str]:
    """What a file says of one side of a tied weight alone, or differently of both: here both are one tensor."""
    sharers: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sharers.setdefault(id(parameter), []).append(name)
    held = {f"{key.path}.{key.part}": entry for key, entry in found.entries.items() if key.path in found.trained}
    wrong = []
    for names in sharers.values():
        here = [name for name in names if name in held]
        if len(names) == 1 or not here:
            continue
        if len(here) < len(names) and not found.config.ties_weights:
            wrong.append(f"{here[0]}: this base ties it to {next(n for n in names if n not in here)}, the adapter does not")
        elif any(not torch.equal(held[here[0]].read_whole(), held[name].read_whole()) for name in here[1:]):
            wrong.append(f"{here[0]}: this base ties it to {here[1]}, and the adapter holds another value for each")
    return wrong


def _wanted_shape(module: Any, key: AdapterKey, r: int) -> tuple[int, ...] | None:
    """The shape a tensor must have here, or None where the module has no place for it."""
    if key.part in ("lora_A", "lora_B"):
        if not isinstance(module, LoraLayer) and not is_supported(module):
            return None
        features = (r, module.in_features) if key.part == "lora_A" else (module.out_features, r)
        return tuple(int(n) for n in features)
    if key.part == "base":
        weight = getattr(module, "weight", None)
        return whole_shape(weight) if isinstance(weight, nn.Parameter) else None
    parameter = dict(module.named_parameters(recurse=False)).get(key.part)
    return None if parameter is None or not parameter.is_floating_point() else whole_shape(parameter)
