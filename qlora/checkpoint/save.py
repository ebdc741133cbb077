"""Writing a checkpoint so that what is half written never counts."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.checkpoint import state
from qlora.checkpoint.reading import is_listed
from qlora.checkpoint.state import Identity, Manifest
from qlora.errors import CheckpointError
from qlora.files import Content, chunks_of, sync_folder, write_file


def write_checkpoint(folder: Path, files: Mapping[str, Content], identity: Identity, keep_last: int) -> None:
    """Write and commit a checkpoint, then remove the oldest. Rank-local; for the owner of the run directory.

    What stands at the folder's place is replaced: it is damaged, or of a run that did not go on from there.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent.parent)
        sweep(folder.parent)
        _commit(folder, files, identity)
        prune(folder, keep_last)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be written ({error.strerror})",
            place=str(folder),
            found=f"{sum(len(chunk) for content in files.values() for chunk in chunks_of(content)):,} bytes to write",
            next_step="make room; the run resumes from its last committed checkpoint",
        ) from error


def _commit(folder: Path, files: Mapping[str, Content], identity: Identity) -> None:
    """Write into a folder of another name, flush, rename, and mark it committed last of all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        table: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            table[name] = _write(temporary / name, content)
        manifest = Manifest(table, identity).to_json()
        _write(temporary / state.MANIFEST_NAME, manifest)
        sync_folder(temporary)
        if folder.exists():
            _discard(folder)
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not to stay full of this
        raise
    sync_folder(folder.parent)
    write_file(folder / state.COMMITTED, state.sha256_of(manifest).encode())


def _write(path: Path, content: Content) -> dict[str, Any]:
    """Write a new file, to the disk. Returns its size and hexadecimal sha256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks_of(content):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def prune(newest: Path, keep_last: int) -> None:
    """Remove the checkpoints before `newest`, but for as many as make `keep_last` with it. Rank-local."""
    step = state.step_of(newest)
    before = [folder for folder in state.committed(newest.parent.parent) if state.step_of(folder) < step]
    for folder in before[: max(0, len(before) - keep_last + 1)]:
        _discard(folder)


def tidy(run_dir: Path, keep_last: int) -> None:
    """Finish what a save or a pruning left that was killed. Rank-local; for the owner of the run directory."""
    folder = run_dir / state.FOLDER
    if not folder.is_dir():
        return
    sweep(folder)
    if done := state.committed(run_dir):
        prune(done[-1], keep_last)


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename the committed checkpoints past a step, so that none is taken for a part of the run that starts there.

    They are damaged, or of a run that is not gone on with; nothing is deleted. Returns their new names. Rank-local; for
    the owner of the run directory.
    """
    renamed = []
    for folder in state.committed(run_dir):
        if state.step_of(folder) <= step:
            continue
        number = 1
        while (aside := folder.with_name(f"aside-{number}-{folder.name}")).exists():
            number += 1
        os.rename(folder, aside)
        renamed.append(aside)
    if renamed:
        sync_folder(run_dir / state.FOLDER)
    return renamed


def _discard(folder: Path) -> None:
    """Rename first: a folder that is being deleted must not look like a checkpoint with files missing."""
    trash = folder.with_name(f".{folder.name}.{os.getpid()}.trash")
    os.rename(folder, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    """What somebody has put elsewhere and linked here is left there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def sweep(parent: Path) -> None:
    """Remove what interrupted saves and prunings left."""
    leftovers = [path for pattern in (".step-*.tmp", ".step-*.trash") for path in parent.glob(pattern)]
    # Renamed, and then never committed.
    leftovers += [path for path in state.numbered(parent) if not is_listed(path / state.COMMITTED)]
    for leftover in leftovers:
        _remove(leftover)
