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
from qlora.distributed.runtime import Engine
from qlora.errors import CheckpointError
from qlora.files import sync_folder


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    engine: Engine,
    trainer: TrainerState,
    identity: Identity,
    *,
    write: bool,
    keep_last: int,
) -> Path:
    """Gather what was trained and its optimizer state, and write it on the rank that has `write`. Collective.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    folder = run_dir / state.FOLDER / state.folder_name(trainer.step)
    parameters = adapter_parameters(model)
    values = whole_parameters(parameters, keep=write)
    moments = whole_optimizer_state(engine, parameters, keep=write)
    if write and not (folder / state.COMMITTED).is_file():
        files = render_files(model, values)
        files[state.OPTIMIZER_NAME] = safetensors_bytes(moments, {"format": "pt"})
        files[state.STATE_NAME] = (dumps(asdict(trainer), indent=2) + "\n").encode()
        try:
            _commit(folder, files, identity)
            prune(run_dir, keep_last)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint cannot be written ({error.strerror})",
                place=str(folder),
                found=f"{sum(map(len, files.values())):,} bytes to write",
                next_step="make room; the run resumes from its last committed checkpoint",
            ) from error
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


def _commit(folder: Path, files: dict[str, bytes], identity: Identity) -> None:
    """Write into a folder of another name, flush, rename, and mark it committed last of all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    table: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        _write(temporary / name, content)
        table[name] = {"size": len(content), "sha256": state.sha256_of(content)}
    _write(temporary / state.MANIFEST_NAME, Manifest(table, identity).to_json())
    sync_folder(temporary)
    if folder.exists():  # renamed once, never committed
        _discard(folder)
    os.rename(temporary, folder)
    sync_folder(folder.parent)
    _write(folder / state.COMMITTED, b"")
    sync_folder(folder)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest committed checkpoints. Rank-local; the owner of the run directory calls it."""
    for folder in state.committed(run_dir)[:-keep_last]:
        _discard(folder)


def _discard(folder: Path) -> None:
    """Rename first: a folder that is being deleted must not look like a checkpoint with files missing."""
    trash = folder.with_name(f".{folder.name}.{os.getpid()}.trash")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def sweep(parent: Path) -> None:
    """Remove what interrupted saves and prunings left."""
    for pattern in (".step-*.tmp", ".step-*.trash"):
        for leftover in parent.glob(pattern):
            shutil.rmtree(leftover)
