"""What lies in an adapter or checkpoint folder, read without torch and without trust.

Only JSON and the header of `adapter_model.safetensors` are parsed. Before a name inside the folder is opened it must be
a regular file that does not lead out of the folder; a pickle file is never opened. What is damaged is named, twenty things
at most and a count, in one AdapterError.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora.adapter.folder import inside, read_json, short, unique_keys
from qlora.cli.adapter_tensors import AdapterTensors, sort_tensors
from qlora.cli.tensor_header import TensorInfo, read_header
from qlora.config.paths import missing_hint
from qlora.errors import AdapterError, CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MANIFEST_NAME = "manifest.json"
COMMITTED_NAME = "COMMITTED"
INITIAL_NAME = "initial_lora.safetensors"
MOST_PROBLEMS = 20
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_STEP_FOLDER = re.compile(r"/checkpoints/step-\d+$")


@dataclass(frozen=True)
class AdapterFolder:
    """A folder whose files were found whole.

    Attributes:
        sorted: what each tensor is for.
        recorded: what this package wrote about the base beside the tensors.
    """

    path: Path
    kind: Literal["adapter", "checkpoint"]
    config: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    sorted: AdapterTensors
    recorded: dict[str, Any]
    manifest: dict[str, Any] | None
    num_verified_files: int
    notes: tuple[str, ...]


def require_adapter(folder: Path) -> None:
    """Raise AdapterError unless the folder exists and holds an adapter's two files; nothing is opened.

    A run directory is answered with the folders in it that are adapters.
    """
    if not folder.exists():
        raise AdapterError("no such folder", place=str(folder), next_step=missing_hint(folder))
    if not folder.is_dir():
        raise AdapterError("an adapter is a folder, this is a file", place=str(folder), next_step=f"name {folder.parent}")
    if (folder / CONFIG_NAME).exists() and (folder / WEIGHTS_NAME).exists():
        return
    inside = [folder / "adapter", *sorted(folder.glob("checkpoints/step-*"), reverse=True)]
    choices = [str(choice) for choice in inside if (choice / CONFIG_NAME).is_file()][:3]
    pickles = [entry.name for entry in folder.glob("adapter_model.*") if entry.suffix in PICKLE_SUFFIXES]
    if pickles and not (folder / WEIGHTS_NAME).exists():
        raise AdapterError(
            "the weights are a pickle file, which is never opened: unpickling runs code",
            place=str(folder / pickles[0]),
            wanted=WEIGHTS_NAME,
            next_step="ask its author for safetensors",
        )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).exists()]
    raise AdapterError(
        "not an adapter",
        place=str(folder),
        found=f"no {' and no '.join(missing)}",
        wanted=f"{CONFIG_NAME} and {WEIGHTS_NAME}",
        next_step=f"name {' or '.join(choices)}" if choices else None,
    )


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Read an adapter's or checkpoint's description and check that it is whole. Opens no tensor and no pickle.

    Raises:
        AdapterError: a file is missing, damaged, leads out of the folder or differs from the manifest.
        CheckpointError: the folder is a checkpoint whose save was never completed.
    """
    require_adapter(folder)
    is_checkpoint = (folder / MANIFEST_NAME).exists() or _STEP_FOLDER.search(folder.absolute().as_posix()) is not None
    manifest, num_verified = None, 0
    if is_checkpoint:
        if not (folder / COMMITTED_NAME).exists():
            raise CheckpointError(
                "this checkpoint was never completed",
                place=str(folder),
                found=f"no {COMMITTED_NAME}",
                next_step="use an older one; a resume skips this one by itself",
            )
        manifest = read_json(folder, MANIFEST_NAME)
        num_verified = _verify_manifest(folder, manifest)
    config = read_json(folder, CONFIG_NAME)
    weights = inside(folder, WEIGHTS_NAME)
    tensors, metadata = read_header(weights)
    found = sort_tensors(tensors, config)
    hint = "a sharded run saved without gathering; save the adapter again" if found.is_empty else None
    _raise_if_any(found.problems, weights, hint)
    recorded = _recorded(metadata)
    _raise_if_any(list(_initial_problems(folder, recorded)), folder, "copy the adapter's folder again, as a whole")
    notes = [
        f"{entry.name} is a pickle file; it was not opened"
        for entry in sorted(folder.iterdir())
        if entry.suffix in PICKLE_SUFFIXES
    ]
    kind: Literal["adapter", "checkpoint"] = "checkpoint" if is_checkpoint else "adapter"
    return AdapterFolder(folder, kind, config, tensors, found, recorded, manifest, num_verified, tuple(notes))


def _recorded(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get("qlora", "{}"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):  # another writer's key of the same name
        return {}
    return value if isinstance(value, dict) else {}


def _initial_problems(folder: Path, recorded: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the factors that training started from, which lie in a file of their own."""
    stated = recorded.get("initial")
    there = (folder / INITIAL_NAME).exists()
    if stated is None:
        if there:
            yield f"{INITIAL_NAME} lies beside an adapter that knows of none"
        return
    try:
        if not isinstance(stated, dict) or _sha256(inside(folder, INITIAL_NAME)) != stated.get("sha256"):
            yield f"{INITIAL_NAME} is another adapter's: it has another sha256 than the adapter's metadata says"
    except AdapterError as error:
        yield f"{INITIAL_NAME}: {error.message}"
    except OSError as error:
        yield f"{INITIAL_NAME} cannot be read: {error.strerror}"


def _verify_manifest(folder: Path, manifest: dict[str, Any]) -> int:
    """Return how many files agree with the manifest in size and sha256; raise AdapterError when one does not."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise AdapterError("lists no files", place=str(folder / MANIFEST_NAME), found=short(files))
    _raise_if_any(list(_manifest_problems(folder, files)), folder, "use another checkpoint; this one is damaged")
    return len(files)


def _manifest_problems(folder: Path, files: dict[str, Any]) -> Iterator[str]:
    for name, wanted in files.items():
        if not isinstance(wanted, dict) or not isinstance(wanted.get("sha256"), str):
            yield f"the manifest's entry for {name} is malformed"
            continue
        try:
            path = inside(folder, name)
            size = path.stat().st_size
            if size != wanted.get("size"):
                yield f"{name} has {size} bytes, the manifest says {wanted.get('size')}"
                continue
            found = _sha256(path)
        except AdapterError as error:
            yield f"{name}: {error.message}"
            continue
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
            continue
        if found != wanted["sha256"].lower():
            yield f"{name} has another sha256 than the manifest: its content changed"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _raise_if_any(problems: list[str], path: Path, next_step: str | None) -> None:
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:MOST_PROBLEMS])
        more = f"\n  and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise AdapterError(f"damaged: {len(problems)} of its parts\n{shown}{more}", place=str(path), next_step=next_step)
