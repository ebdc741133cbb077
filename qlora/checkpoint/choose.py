"""The checkpoint that a job goes on from: found, compared with the job, and what is given up by it said and recorded."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from qlora.checkpoint import resume, room, state
from qlora.checkpoint.reading import size_of
from qlora.checkpoint.resume import Found
from qlora.checkpoint.state import Identity
from qlora.config.schema import JobConfig
from qlora.distributed.runtime import Runtime
from qlora.errors import CheckpointError

FORCED_NAME = "forced.jsonl"


def choose_checkpoint(
    runtime: Runtime, run_dir: Path, config: JobConfig, identity: Identity, *, force: bool
) -> Found | None:
    """The checkpoint to go on from; None for a new run. Collective.

    Warns of what `force` overrides, which is also kept in forced.jsonl, and of other versions of the stack.

    Raises:
        CheckpointError: on every rank: it is damaged, of another job, not there for all ranks, or the disk has no room for
            the next one.
    """
    found, sizes = runtime.from_main(lambda: _choose(run_dir, config, identity, force))
    if found is not None:
        folder = found.folder
        runtime.together(lambda: _see(folder, sizes))
    return found


def _choose(run_dir: Path, config: JobConfig, identity: Identity, force: bool) -> tuple[Found | None, dict[str, int]]:
    """What the main rank finds, and the sizes of its files. For the owner of the run directory."""
    # Ranks that their launcher starts again go on from what the start before has saved, whatever that one went on from.
    found = resume.find_checkpoint(run_dir, "auto") if _is_restart() else None
    found = found or resume.find_checkpoint(run_dir, config.checkpoint.resume)
    if found is None:
        return None, {}
    job = replace(identity, global_batch_size=resume.global_batch_of(found, config, identity.world_size))
    given_up = resume.check_identity(found, job, force=force)
    # Now, because loading the base may take minutes.
    room.check_disk(run_dir, room.bytes_of(found.folder), force=force)
    for line in given_up:
        print(f"warning: --force: {line}; the run no longer continues exactly", file=sys.stderr, flush=True)
    if given_up:
        _record(run_dir / FORCED_NAME, found.trainer.step, given_up)
    if changed := resume.changed_versions(found, job):
        print(f"warning: {changed}: the run may not continue to the last bit", file=sys.stderr, flush=True)
    return found, {name: recorded["size"] for name, recorded in state.read_manifest(found.folder).files.items()}


def _is_restart() -> bool:
    """Whether the launcher has started these ranks before (`--max_restarts`)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def _see(folder: Path, sizes: dict[str, int]) -> None:
    """Make sure that this rank sees what the main rank has found. Raises CheckpointError."""
    for name, wanted in sizes.items():
        try:
            size = size_of(folder / name)
            found = None if size == wanted else f"{size} bytes"
        except OSError as error:
            found = error.strerror
        if found is not None:
            raise CheckpointError(
                f"{socket.gethostname()} does not see the checkpoint that the main rank goes on from",
                place=str(folder / name),
                found=found,
                wanted=f"{wanted} bytes",
                next_step="train.output_dir must be a folder that all nodes share, under the same path",
            )


def _record(path: Path, step: int, given_up: list[str]) -> None:
    """Append what was overridden at a step, which later checkpoints do not show."""
    row = {"step": step, "given_up": given_up, "time": time.time()}
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
