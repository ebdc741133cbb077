"""Writing a checkpoint: all ranks gather, one writes, and what is half written never counts."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from qlora.adapter.files import adapter_parameters, render_files
from qlora.checkpoint import state
from qlora.checkpoint.state import Identity, Manifest, TrainerState
from qlora.distributed.collectives import whole_parameters
from qlora.distributed.engine import Engine
from qlora.distributed.runtime import Runtime
from qlora.errors import CheckpointError
from qlora.files import sync_folder


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    engine: Engine,
    trainer: TrainerState,
    identity: Identity,
    *,
    runtime: Runtime,
    keep_last: int,
) -> Path:
    """Gather what was trained and its optimizer state, and write it on the main rank. Collective.

    Raises:
        CheckpointError: it cannot be written, on every rank; earlier checkpoints are untouched.
    """
    folder = run_dir / state.FOLDER / state.folder_name(trainer.step)
    parameters = adapter_parameters(model)
    values = whole_parameters(parameters, keep=runtime.is_main)
    moments = whole_optimizer_state(engine, parameters, keep=runtime.is_main)

    def write() -> None:
        files = render_files(model, values)
        files[state.OPTIMIZER_NAME] = safetensors_bytes(moments, {"format": "pt"})
        files[state.STATE_NAME] = (dumps(asdict(trainer), indent=2) + "\n").encode()
        write_checkpoint(folder, files, identity, keep_last)

    runtime.from_main(write)
    return folder


def whole_optimizer_state(engine: Engine, parameters: dict[str, nn.Parameter], *, keep: bool) -> dict[str, Tensor]:
    """`KEY/exp_avg` and the like for each tensor of the adapter, on the CPU. Collective; {} where not kept."""
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    found: dict[str, Tensor] = {}
    for key, parameter in parameters.items():
        for part, value in engine.optimizer_state(names[id(parameter)]).items():
            if keep:
                found[f"{key}/{part}"] = value.detach().to("cpu", copy=True).contiguous()
    return found


def write_checkpoint(folder: Path, files: dict[str, bytes], identity: Identity, keep_last: int) -> None:
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
            found=f"{sum(map(len, files.values())):,} bytes to write",
            next_step="make room; the run resumes from its last committed checkpoint",
        ) from error


def _commit(folder: Path, files: dict[str, bytes], identity: Identity) -> None:
    """Write into a folder of another name, flush, rename, and mark it committed last of all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        table: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            _write(temporary / name, content)
            table[name] = {"size": len(content), "sha256": state.sha256_of(content)}
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
    _write(folder / state.COMMITTED, state.sha256_of(manifest).encode())
    sync_folder(folder)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def prune(newest: Path, keep_last: int) -> None:
    """Remove the checkpoints before `newest`, but for as many as make `keep_last` with it. Rank-local."""
    step = state.step_of(newest)
    before = [folder for folder in state.committed(newest.parent.parent) if state.step_of(folder) < step]
    for folder in before[: max(0, len(before) - keep_last + 1)]:
        _discard(folder)


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
    shutil.rmtree(trash)


def sweep(parent: Path) -> None:
    """Remove what interrupted saves and prunings left."""
    leftovers = [path for pattern in (".step-*.tmp", ".step-*.trash") for path in parent.glob(pattern)]
    # Renamed, and then never committed.
    leftovers += [path for path in state.numbered(parent) if not (path / state.COMMITTED).exists()]
    for leftover in leftovers:
        shutil.rmtree(leftover)
