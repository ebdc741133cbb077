"""Where a base comes from: `builtin:tiny`, a Hugging Face folder, or a hub id, made a folder on this machine.

What is recorded of a base is its name as the user wrote it, the commit a hub revision resolved to, and a fingerprint; of
a base that `qlora prepare` has quantized also what it was made from, so that the two count as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from qlora.assets import tiny_path
from qlora.config.schema import QuantizationConfig, Section
from qlora.errors import BaseModelError
from qlora.model_files import find_weight_files
from qlora.quant import shards
from qlora.quant.pickled import PICKLES

BUILTIN = "builtin:tiny"
# Second copies of the weights, in layouts that are not read.
NOT_NEEDED = ["consolidated*", "original/*"]
FILES_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
ORIGIN_NAME = "qlora_base.json"
MERGED_NAME = "qlora_merged.json"

Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Origin(Section):
    """What a prepared base was made from, and how: the content of `qlora_base.json`.

    Attributes:
        name, revision, fingerprint: of the unquantized base; see `BaseSource`.
        dtype: of the tensors that are not quantized, and what the others were rounded to before they were.
        prepared: fingerprint of the folder that the record lies in. A copy beside other weights is no record of them.
        qlora: the version that wrote it.
    """

    name: str
    revision: str | None
    fingerprint: Fingerprint
    dtype: str
    quantization: QuantizationConfig
    prepared: Fingerprint
    qlora: str


class Merged(Section):
    """What `qlora merge` leaves beside weights that are not quantized: the content of `qlora_merged.json`.

    Attributes:
        onto: the form, one of `merge_plan.FORMS`.
        adapter: SHA-256 of the merged adapter's tensor file.
    """

    onto: Literal["dequantized", "original"]
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    adapter: Fingerprint | None = None


@dataclass(frozen=True)
class BaseSource:
    """A base on this machine.

    Attributes:
        name: as the user wrote it.
        folder: where its files are.
        revision: hub commit, or None.
        fingerprint: see `shards.fingerprint`; None where weights are pickle files.
        origin: what a prepared base was made from; None for every other base.
    """

    name: str
    folder: Path
    revision: str | None
    fingerprint: str | None
    origin: Origin | None = None

    def record(self) -> dict[str, Any]:
        """What is written beside adapters and checkpoints: no path of this machine unless the user gave one."""
        record: dict[str, Any] = {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}
        if self.origin is not None:
            record["origin"] = self.origin.model_dump(mode="json", exclude={"prepared", "qlora"})
        return record


def fingerprints_of(record: Mapping[str, Any]) -> set[str]:
    """The fingerprints a recorded base goes by: its own, and that of what it was prepared from.

    Two records are of one base where these meet.
    """
    origin = record.get("origin")
    found = (record.get("fingerprint"), origin.get("fingerprint") if isinstance(origin, Mapping) else None)
    return {fingerprint for fingerprint in found if isinstance(fingerprint, str)}


def resolve_base(base: str, revision: str | None = None, *, allow_pickle: bool = False) -> BaseSource:
    """Find a base's folder, fetching it from the hub where the name is a hub id. Rank-local.

    Raises:
        BaseModelError: no such folder or hub id, no config.json, no safetensors (and pickle was not asked for), or a
            damaged record of what the base was prepared from.
    """
    if base == BUILTIN:
        folder, commit = tiny_path(), None
    elif Path(base).expanduser().is_dir():
        folder, commit = Path(base).expanduser(), None
    elif base.startswith(("/", "./", "../", "~")) or base.count("/") > 1:
        raise BaseModelError("no such folder", place="model.base", found=base, wanted="a Hugging Face model folder")
    else:
        folder, commit = _fetch(base, revision, allow_pickle)
    if not (folder / "config.json").is_file():
        raise BaseModelError("no config.json", place=str(folder), wanted="a Hugging Face model folder")
    files = find_weight_files(folder)
    if not files:
        pickles = sorted(file.name for file in folder.glob(PICKLES))
        if not pickles or not allow_pickle:
            raise BaseModelError(
                "the base has no safetensors files",
                place=str(folder),
                found=", ".join(pickles[:3]) if pickles else "no weights at all",
                wanted="model.safetensors, or shards with model.safetensors.index.json",
                next_step="convert the weights to safetensors, or set model.allow_pickle to true" if pickles else None,
            )
        return BaseSource(base, folder, commit, None)
    fingerprint = shards.fingerprint(folder, files)
    return BaseSource(base, folder, commit, fingerprint, _read_origin(folder, fingerprint))


def _read_origin(folder: Path, fingerprint: str) -> Origin | None:
    """The record that `qlora prepare` leaves, or None where there is none."""
    path = folder / ORIGIN_NAME
    if not path.is_file():
        return None
    next_step = f"prepare the base again, or delete {ORIGIN_NAME}: the base is then taken for one of its own"
    try:
        origin = Origin.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        fault = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        raise BaseModelError(
            "damaged record of what the base was prepared from",
            place=str(path),
            found=f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") if fault else str(error),
            next_step=next_step,
        ) from error
    if origin.prepared != fingerprint:
        raise BaseModelError(
            "the record of what the base was prepared from belongs to other weights, or config.json was changed",
            place=str(path),
            found=f"{origin.prepared[:12]}, prepared from {origin.name}",
            wanted=fingerprint[:12],
            next_step=next_step,
        )
    return origin


def read_merged(folder: Path) -> Merged | None:
    """The record that `qlora merge` leaves, or None where there is none. Rank-local. Raises BaseModelError."""
    path = folder / MERGED_NAME
    if not path.is_file():
        return None
    try:
        return Merged.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        fault = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        raise BaseModelError(
            "damaged record of how the model was merged",
            place=str(path),
            found=f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") if fault else str(error),
            next_step=f"merge again, or delete {MERGED_NAME}: the model is then taken for any other base",
        ) from error


def _fetch(base: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None]:
    """Download, or find in the hub's cache. Returns folder and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = FILES_NEEDED + (["*.bin"] if allow_pickle else [])
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_NEEDED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            "neither a folder here nor to be had from the hub",
            place="model.base",
            found=f"{base} ({type(error).__name__})",
            wanted="builtin:tiny, a Hugging Face model folder, or a hub id",
            next_step="check the name and the network, or download the base and give its folder",
        ) from error
    # The hub's cache names a snapshot's folder after its commit.
    return folder, folder.name if folder.parent.name == "snapshots" else revision
