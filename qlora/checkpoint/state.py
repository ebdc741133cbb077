"""What a checkpoint holds and where.

    OUTPUT_DIR/checkpoints/step-00000100/
        adapter_config.json, adapter_model.safetensors   the adapter; where it is fp32, also the master copy
        optimizer.safetensors                            `KEY/exp_avg`, `KEY/exp_avg_sq` for each tensor of the adapter, and
                                                         `KEY/master`, fp32, where the adapter is bfloat16
        trainer_state.json                               step, position of the data, totals, fp16's loss scale
        manifest.json                                    size and sha256 of each file; base, data, config, versions
        COMMITTED                                        written last: without it the folder does not count; sha256 of
                                                         manifest.json

That is 12 bytes a trainable parameter, or 14 where the adapter is bfloat16, and nothing of the frozen base.

Everything is stored whole and by name, so that it does not depend on how many ranks there were. Nothing is drawn at
random from a state that would have to be saved: dropout and the order of the data are functions of seed and step, the
learning rate of the step.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora.checkpoint.reading import is_listed, read_bytes
from qlora.errors import CheckpointError

FOLDER = "checkpoints"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "trainer_state.json"
MANIFEST_NAME = "manifest.json"
COMMITTED = "COMMITTED"
PREFIX = "step-"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", OPTIMIZER_NAME, STATE_NAME)
PACKAGES = ("qlora", "torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "safetensors", "datasets")


@dataclass(frozen=True)
class TrainerState:
    """Where training stood.

    Attributes:
        step: optimizer steps done.
        global_index: the data's position, in packs taken.
        num_tokens, num_target_tokens: so far, over all ranks.
        num_skipped: steps that updated nothing, because the gradient was not finite.
        loss_scale: what fp16's dynamic loss scale had come to; None where there is none.
    """

    step: int
    global_index: int
    num_tokens: int
    num_target_tokens: int
    num_skipped: int = 0
    loss_scale: dict[str, float] | None = None


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. A resume compares it with the job's own.

    Attributes:
        base: name, revision and fingerprint of the base.
        data: fingerprint of the token rows.
        plan: hash of the packing plan.
        config: the resolved job.
        world_size, mode: how it was run; these may change.
        versions: of the stack.
        global_batch_size: packs of an optimizer step over all ranks; these stay. 0: as the job file and the ranks make it.
    """

    base: dict[str, Any]
    data: str
    plan: str
    config: dict[str, Any]
    world_size: int
    mode: str
    versions: dict[str, str]
    global_batch_size: int = 0  # checkpoints of before have none


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    files: dict[str, dict[str, Any]]
    identity: Identity

    def to_json(self) -> bytes:
        """The file's content."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read a committed checkpoint's manifest. Raises CheckpointError where it is missing or damaged."""
    path = folder / MANIFEST_NAME
    try:
        content = read_bytes(path)
        recorded = read_bytes(folder / COMMITTED).decode("ascii")
        # A loss of power may leave the marker without its content; everything else was on the disk before it.
        if recorded and recorded != sha256_of(content):
            raise CheckpointError("the manifest does not match its checksum", place=str(path))
        fields = json.loads(content)
        files = {str(name): {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in fields["files"].items()}
        missing = [name for name in NEEDED if name not in files]
        if missing:
            raise CheckpointError(f"the manifest does not list {missing[0]}", place=str(path))
        return Manifest(files, Identity(**fields["identity"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the manifest cannot be read: {error}", place=str(path)) from error


def folder_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """The step a checkpoint's folder is named after. Raises ValueError for other names."""
    if not folder.name.startswith(PREFIX):
        raise ValueError(folder.name)
    return int(folder.name.removeprefix(PREFIX))


def committed(run_dir: Path) -> list[Path]:
    """The run's committed checkpoints, oldest first, by step and never by time."""
    return sorted((f for f in numbered(run_dir / FOLDER) if is_listed(f / COMMITTED)), key=step_of)


def numbered(parent: Path) -> list[Path]:
    """The folders with a checkpoint's name, committed or not, in no order."""
    return [f for f in parent.glob(f"{PREFIX}*") if f.name.removeprefix(PREFIX).isdigit() and f.is_dir()]


def sha256_of(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def stack_versions() -> dict[str, str]:
    """Versions of this project and of what it stands on, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
