"""Is there room on the disk for what a run is going to save? Asked before the run has anything to lose.

A file system cannot always answer: a quota often does not show, and others write too. A disk that fills up all the same
ends the run with its last checkpoint whole.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

from torch import nn

from qlora.adapter.files import adapter_parameters
from qlora.checkpoint import state
from qlora.distributed.collectives import whole_shape
from qlora.errors import CheckpointError

MOMENT_BYTES = 8  # two of fp32 a parameter
MASTER_BYTES = 4  # beside a parameter that is narrower
OTHER_BYTES = 1 << 20  # headers, manifest, config, a tokenizer's small files
AT_ONCE = 2  # the new one is whole before an old one goes


def checkpoint_bytes(model: nn.Module) -> int:
    """About what a checkpoint of a model's adapter takes on the disk, in bytes. Rank-local."""
    total = OTHER_BYTES
    for parameter in adapter_parameters(model).values():
        width = parameter.element_size()
        total += math.prod(whole_shape(parameter)) * (width + MOMENT_BYTES + (MASTER_BYTES if width < 4 else 0))
    return total


def bytes_of(checkpoint: Path) -> int:
    """What a checkpoint that is there takes, in bytes. Raises CheckpointError where its manifest cannot be read."""
    return sum(int(recorded["size"]) for recorded in state.read_manifest(checkpoint).files.values())


def check_disk(run_dir: Path, num_bytes: int, *, force: bool) -> None:
    """Refuse a run whose checkpoints would fill the disk. Rank-local; for the owner of the run directory.

    Args:
        run_dir: exists.
        num_bytes: of one checkpoint.
        force: print a warning instead.

    Raises:
        CheckpointError: less than two checkpoints' room is free.
    """
    free, wanted = shutil.disk_usage(run_dir).free, AT_ONCE * num_bytes
    if free >= wanted:
        return
    if force:
        room = f"{free:,} bytes free in {run_dir} for {AT_ONCE} checkpoints of {num_bytes:,}"
        print(f"warning: --force: {room}; a save may fail", file=sys.stderr, flush=True)
        return
    raise CheckpointError(
        "the disk has no room for the checkpoints of this run",
        place=f"train.output_dir: {run_dir}",
        found=f"{free:,} bytes free",
        wanted=f"{wanted:,} bytes: {AT_ONCE} checkpoints of {num_bytes:,}, the new one before the old one is removed",
        next_step="make room, choose a train.output_dir on another disk, or give --force to try all the same",
    )
