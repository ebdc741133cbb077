"""What must hold after each kill, and what a run in pieces must have in common with the run in one."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import Start

# Any number of ranks adds up to the same sum but for rounding, which here is about 1e-7.
LOSS_RELATIVE = 1e-5
ADAPTER_ABSOLUTE = 2e-5
EXACT = ("epoch", "num_tokens", "num_target_tokens", "learning_rate")


class Broken(Exception):
    """Something that must hold does not."""


@dataclass(frozen=True)
class Piece:
    """What one start contributed: it began after step `after`, and trained these documents at its steps."""

    start: Start
    after: int
    documents: dict[int, Counter[str]]


def rows_by_step(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The training rows that count: the last of each step. Lines that a kill has cut are none."""
    rows = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            rows[row["step"]] = row
    return rows


def piece_of(start: Start, after: int) -> Piece:
    """Read what a start's ranks wrote down: of each step that all of them finished, the documents."""
    found: dict[int, list[list[list[str]]]] = {}
    for rank in range(start.world.num_ranks):
        path = start.seen(rank)
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            found.setdefault(row["step"], []).append(row["documents"])
    steps = sorted(found)
    if steps != list(range(after + 1, after + 1 + len(steps))):
        raise Broken(f"went on from step {after} with the steps {steps}")
    whole = {step: ranks for step, ranks in found.items() if len(ranks) == start.world.num_ranks}
    documents = {
        step: Counter(name for micro_steps in ranks for names in micro_steps for name in names)
        for step, ranks in whole.items()
    }
    return Piece(start, after, documents)


def committed_steps(run_dir: Path) -> list[int]:
    return sorted(int(mark.parent.name[5:]) for mark in run_dir.glob("checkpoints/step-*/COMMITTED"))


def check_disk(start: Start, before: list[int], keep_last: int, *, trust: bool = False) -> int:
    """What lies in the run directory after a start. Returns the step of the newest checkpoint, 0 for none.

    Args:
        before: the steps of the checkpoints before the start, of which the newest opened.
        trust: do not open it.
    """
    from qlora.checkpoint.resume import find_checkpoint

    promised = promised_steps(start)
    steps = committed_steps(start.run_dir)
    newest = steps[-1] if steps else 0
    if steps and not trust:
        found = find_checkpoint(start.run_dir, "auto")
        opened = 0 if found is None else found.trainer.step
        if opened != newest:
            raise Broken(f"the newest checkpoint, of step {newest}, does not open")
        newest = opened
    known = max([0, *before, *promised])
    if newest < known:
        raise Broken(f"step {known} was committed, and the newest checkpoint is of step {newest}")
    # One that is committed and killed before it has removed the oldest leaves one more.
    if len(steps) > max(keep_last, 0 if len(promised) > 1 else len(before)) + 1:
        raise Broken(f"checkpoints pile up: {steps}")
    left = leftovers(start.run_dir)
    # A save that was cut short leaves what it wrote, and what it was removing; the next one sweeps before it writes.
    if len(left) > 2:
        raise Broken(f"leftovers pile up: {left}")
    return newest


def promised_steps(start: Start) -> list[int]:
    """The checkpoints whose COMMITTED a start has seen on the disk."""
    operations = start.note.with_suffix(".operations")
    lines = operations.read_text().splitlines() if operations.exists() else []
    return [int(line[len("committed step-") :]) for line in lines if line.startswith("committed ")]


def leftovers(run_dir: Path) -> list[str]:
    """What does not count in the folder of checkpoints. What was damaged is set aside, and nobody's to remove."""
    folder = run_dir / "checkpoints"
    inside = sorted(folder.iterdir()) if folder.exists() else []
    return [
        path.name for path in inside if not ((path / "COMMITTED").exists() and path.name.startswith(("step-", "aside-")))
    ]


def check_whole(
    run_dir: Path, pieces: list[Piece], reference: Path, wanted: dict[int, Counter[str]], keep_last: int
) -> None:
    """A run that has come to its end is the reference: losses, counts, documents, adapter."""
    rows, expected = rows_by_step(run_dir), rows_by_step(reference)
    if sorted(rows) != sorted(expected):
        raise Broken(f"metrics.jsonl has the steps {sorted(rows)}")
    for step, row in expected.items():
        for key in EXACT:
            if rows[step][key] != row[key]:
                raise Broken(f"{key} of step {step}: {rows[step][key]}, without kills {row[key]}")
        if not math.isclose(rows[step]["loss"], row["loss"], rel_tol=LOSS_RELATIVE):
            raise Broken(f"loss of step {step}: {rows[step]['loss']}, without kills {row['loss']}")
    for step in expected:
        # What a start did past the checkpoint that the next one began from does not count.
        piece = next(piece for piece in reversed(pieces) if piece.after < step)
        if step not in piece.documents:
            raise Broken(f"step {step} counts for start {piece.start.number}, whose ranks did not all do it")
        lost, doubled = wanted[step] - piece.documents[step], piece.documents[step] - wanted[step]
        if lost or doubled:
            raise Broken(f"step {step}, start {piece.start.number}: {len(lost)} documents lost, {len(doubled)} not its own")
    status = json.loads((run_dir / "status.json").read_text())
    if (status["state"], status["step"]) != ("done", max(expected)):
        raise Broken(f"status.json says {status}")
    steps = committed_steps(run_dir)
    if steps[-1] != max(expected) or len(steps) != keep_last or leftovers(run_dir):
        raise Broken(f"the checkpoints are {steps} and {leftovers(run_dir)}")
    hidden = [path.name for folder in (run_dir, run_dir / "adapter") for path in folder.glob(".*")]
    if hidden:
        raise Broken(f"kills left {hidden}")
    check_adapter(run_dir / "adapter", reference / "adapter")


def check_adapter(found: Path, wanted: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (found, wanted))
    if set(ours) != set(theirs):
        raise Broken("the adapter has other tensors")
    furthest = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
    if not furthest <= ADAPTER_ABSOLUTE:
        raise Broken(f"the adapter differs by {furthest:.2e}")


def check_epochs(documents: dict[int, Counter[str]], epochs: dict[int, float], num_rows: int) -> None:
    """Every epoch of a run takes every row exactly once.

    Args:
        epochs: epochs done at the end of each step.
    """
    by_epoch: dict[int, Counter[str]] = {}
    for step, names in documents.items():
        by_epoch.setdefault(math.ceil(round(epochs[step], 6)), Counter()).update(names)
    whole = int(round(max(epochs.values()), 6))
    if whole < 2:
        raise Broken("the run does not reach past the end of an epoch")
    for epoch in range(1, whole + 1):
        names = by_epoch[epoch]
        if len(names) != num_rows or set(names.values()) != {1}:
            raise Broken(f"epoch {epoch} has {len(names)} of {num_rows} rows, one of them {max(names.values())} times")
