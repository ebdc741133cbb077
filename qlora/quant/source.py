"""Where a base comes from: `builtin:tiny`, a Hugging Face folder, or a hub id, made a folder on this machine.

What is recorded of a base is its name as the user wrote it, the commit a hub revision resolved to, and a fingerprint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora.assets import tiny_path
from qlora.errors import BaseModelError
from qlora.quant import shards
from qlora.quant.pickled import PICKLES

BUILTIN = "builtin:tiny"
# Second copies of the weights, in layouts that are not read.
NOT_NEEDED = ["consolidated*", "original/*"]
FILES_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class BaseSource:
    """A base on this machine.

    Attributes:
        name: as the user wrote it.
        folder: where its files are.
        revision: hub commit, or None.
        fingerprint: see `shards.fingerprint`; None where weights are pickle files.
    """

    name: str
    folder: Path
    revision: str | None
    fingerprint: str | None

    def record(self) -> dict[str, Any]:
        """What is written beside adapters and checkpoints: no path of this machine unless the user gave one."""
        record = asdict(self)
        del record["folder"]
        return record


def resolve_base(base: str, revision: str | None = None, *, allow_pickle: bool = False) -> BaseSource:
    """Find a base's folder, fetching it from the hub where the name is a hub id. Rank-local.

    Raises:
        BaseModelError: no such folder or hub id, no config.json, or no safetensors (and pickle was not asked for).
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
    files = shards.find_weight_files(folder)
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
    return BaseSource(base, folder, commit, shards.fingerprint(folder, files))


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
