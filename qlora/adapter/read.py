"""Opening adapter files: everything that can be said of a folder without a model is said here, all at once.

Reads JSON and the header of a safetensors file; a pickle file is never opened, and no name leads out of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from qlora.adapter import config_file
from qlora.adapter.config_file import CONFIG_NAME
from qlora.adapter.folder import inside, unique_keys
from qlora.adapter.keys import BASE, PARTS_A, PARTS_B, PREFIX, AdapterKey, parse_key
from qlora.adapter.residual import RecordedInitial, open_initial
from qlora.config.schema import QuantizationConfig
from qlora.errors import AdapterError, BaseModelError
from qlora.lora.token_rows import ROWS
from qlora.quant import shards

WEIGHTS_NAME = "adapter_model.safetensors"
METADATA_KEY = "qlora"
TEMPLATE_NAME = "chat_template.jinja"
MOST_SHOWN = 20


class _RecordedBase(BaseModel):
    """Which base an adapter was trained on."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    revision: str | None = None
    fingerprint: str | None = None
    origin: dict[str, Any] | None = None


class _Recorded(BaseModel):
    """What this project writes of the base into the metadata, all of it or nothing; other keys have other readers."""

    model_config = ConfigDict(extra="allow")

    base: _RecordedBase
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    quantization: QuantizationConfig | None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk whose names, dtypes and config have been checked, with no tensor read yet.

    Attributes:
        entries: where each tensor lies.
        described: what this project recorded of the base ({} for a file of PEFT's).
        initial: the record of a start that was found from the base's weights.
    """

    folder: Path
    config: config_file.AdapterConfig
    entries: dict[AdapterKey, shards.TensorEntry] = field(repr=False)
    described: dict[str, Any]
    initial: RecordedInitial | None = None

    @property
    def changes_base(self) -> bool:
        """Whether it was trained on a residual of its base, and computes nothing sensible beside the base itself."""
        return self.initial is not None and self.initial.changes_base

    @property
    def targeted(self) -> list[str]:
        """Paths of the layers it adapts."""
        return list(dict.fromkeys(key.path for key in self.entries if key.is_of_update))

    @property
    def modules(self) -> set[str]:
        """Paths of the modules it holds anything for, and of what they are in."""
        parts = [key.path.split(".") for key in self.entries]
        return {".".join(names[:end]) for names in parts for end in range(1, len(names) + 1)}

    @property
    def trained(self) -> list[str]:
        """Paths of the modules it replaces as wholes."""
        return list(dict.fromkeys(key.path for key in self.entries if key.is_of_whole))

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """Token ids of the rows that it holds, by the path of their embedding or head. Raises AdapterError."""
        return {key.path: self.config.ids_of(key.path, self.folder) for key in self.entries if key.part == ROWS}

    def read(self, key: AdapterKey) -> Tensor:
        """One tensor, on the CPU. Raises AdapterError where the file ends early, cannot be read, or is not finite."""
        entry = self.entries[key]
        try:
            value = entry.read_whole()
        except BaseModelError as error:
            raise AdapterError(error.message, place=error.place) from error
        if not torch.isfinite(value.float() if value.itemsize == 1 else value).all():
            raise AdapterError(f"{entry.name} holds values that are not finite", place=str(entry.file))
        return value

    def read_all(self) -> dict[AdapterKey, Tensor]:
        """Every tensor but the copies of the base's, on the CPU. Raises AdapterError naming all that cannot be used."""
        found, problems = {}, []
        for key in self.entries:
            if key.part != BASE:
                try:
                    found[key] = self.read(key)
                except AdapterError as error:
                    problems.append(error.message)
        refuse(problems, f"{len(problems)} tensors cannot be used", self.folder / WEIGHTS_NAME)
        return found


def refuse(problems: Sequence[str], message: str, place: Path, next_step: str | None = None) -> None:
    """Raise AdapterError with all problems, of which so many are shown as anybody reads, where there are any."""
    if problems:
        shown = [*problems[:MOST_SHOWN]]
        if len(problems) > MOST_SHOWN:
            shown.append(f"and {len(problems) - MOST_SHOWN} more")
        raise AdapterError(message, place=str(place), found="\n         ".join(shown), next_step=next_step)


def open_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter's config and header. Rank-local.

    Raises:
        AdapterError: files missing, damaged, of pickle kind or outside of the folder; tensors of a kind or dtype that is no
            adapter's, given twice, or without their partner; or none at all.
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
    inside(folder, WEIGHTS_NAME)
    if (folder / TEMPLATE_NAME).is_file():
        inside(folder, TEMPLATE_NAME)
    try:
        header, metadata = shards.read_header_and_metadata(file)
    except BaseModelError as error:
        raise AdapterError(error.message, place=error.place, found=error.found, wanted=error.wanted) from error
    described = _described(metadata, file)
    found = AdapterFile(folder, config, _entries(header, file), described, open_initial(folder, described))
    paths = [f"{PREFIX}{path}" for path in found.modules]
    absent = [name for name in config.modules_to_save if not any(path.endswith(name) for path in paths)]
    refuse(absent, "modules_to_save names modules of which the file holds nothing", folder / CONFIG_NAME)
    if config.token_ids and not found.token_rows:
        refuse(["nothing"], "trainable_token_indices names tokens of which the file holds no rows", file)
    return found


def _entries(header: dict[str, shards.TensorEntry], file: Path) -> dict[AdapterKey, shards.TensorEntry]:
    """What each tensor of the file is."""
    empty = not header or any(entry.num_elements == 0 for entry in header.values())
    if empty:
        raise AdapterError(
            "the adapter is empty", place=str(file), next_step="it was saved from shares without gathering; train again"
        )
    entries: dict[AdapterKey, shards.TensorEntry] = {}
    problems = []
    for name, entry in header.items():
        try:
            key = parse_key(name, str(file))
        except AdapterError as error:
            problems.append(error.message)
            continue
        if not entry.dtype.is_floating_point:
            problems.append(f"{name} is of dtype {str(entry.dtype).removeprefix('torch.')}, which no adapter is")
        if key in entries:
            problems.append(f"{name} is the same tensor as {entries[key].name}")
        entries[key] = entry
    problems += _without_partner(entries)
    refuse(problems, f"{len(problems)} tensors cannot be used", file)
    return entries


def _without_partner(keys: Iterable[AdapterKey]) -> list[str]:
    """Layers of which the file holds A or B alone."""
    has: dict[str, set[str]] = {"A": set(), "B": set()}
    anything: dict[str, None] = {}
    for key in keys:
        if key.is_of_update:
            anything[key.path] = None
            for side, parts in (("A", PARTS_A), ("B", PARTS_B)):
                if key.part in parts:
                    has[side].add(key.path)
    lacking = {path: [side for side in "AB" if path not in has[side]] for path in anything}
    return [f"{path} has no lora_{' and no lora_'.join(sides)}" for path, sides in lacking.items() if sides]


def _described(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    """What this project wrote beside the tensors, checked."""
    try:
        described = json.loads(metadata.get(METADATA_KEY, "{}"), object_pairs_hook=unique_keys)
        if not isinstance(described, dict):
            raise TypeError("not a table")
        if described.keys() & _Recorded.model_fields.keys():
            _Recorded.model_validate(described)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise AdapterError(
            f"damaged metadata: {'.'.join(map(str, fault['loc']))}: {fault['msg']}",
            place=str(file),
            next_step="save the adapter again; a newer version may have written it",
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"damaged metadata: {error}", place=str(file)) from error
    return described
