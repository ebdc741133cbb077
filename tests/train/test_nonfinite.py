"""Which rows are saved aside, when a run ends, and what is nothing unusual."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora.data.sampler import Position
from qlora.errors import QloraError
from qlora.train import nonfinite
from qlora.train.nonfinite import NonFiniteHook
from qlora.train.step import StepResult

GOOD = StepResult(1, 0.1, 0.5, 1.5, 1e-3, 100, 6, 100, 0.25, Position(4), False)


def at(step: int, *, loss: float = 0.5, norm: float = 1.5, micro_steps: tuple[int, ...] = ()) -> StepResult:
    skipped = not math.isfinite(norm)
    moved = replace(GOOD, step=step, position=Position(4 * step), loss=loss, grad_norm=norm, skipped=skipped)
    return replace(moved, nonfinite_micro_steps=micro_steps)


def hook_in(run_dir: Path, *, skips_overflow: bool = False, others: tuple[int, ...] = (), most: int = 3) -> NonFiniteHook:
    """Rank 0 of two, with two micro-steps; the other rank's micro-steps are given."""
    runtime: Any = SimpleNamespace(
        world_size=2, is_main=True, gather_objects=lambda own: [own, others], from_main=lambda work: work()
    )
    loader: Any = SimpleNamespace(
        rows_at=lambda position, micro_step, rank: [(position.global_index + 10 * rank + micro_step, [1, 2])]
    )
    return NonFiniteHook(
        run_dir,
        runtime,
        loader,
        most_in_a_row=most,
        position=Position(0),
        num_micro_steps=2,
        skips_overflow=skips_overflow,
        decode=lambda ids: "é" * len(ids),
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_rows_of_the_micro_steps_that_did_it_are_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = hook_in(tmp_path, others=(1,))
    hook.after_step(at(1), is_last=False)
    hook.after_step(at(2, loss=math.nan, norm=math.nan), is_last=False)
    # Of the step that began at 4 packs, rank 1, micro-step 1.
    (row,) = rows(tmp_path / "nonfinite/step-2.jsonl")
    assert row == {"step": 2, "rank": 1, "micro_step": 1, "row": 4 + 10 + 1, "input_ids": [1, 2], "text": "éé"}
    err = capsys.readouterr().err
    assert "warning: step 2 skipped" in err
    assert "ranks 1" in err


def test_of_a_gradient_all_rows_of_the_step_are(tmp_path: Path) -> None:
    hook_in(tmp_path).after_step(at(1, norm=math.inf), is_last=False)
    assert [row["row"] for row in rows(tmp_path / "nonfinite/step-1.jsonl")] == [0, 1, 10, 11]


def test_several_in_a_row_end_the_run(tmp_path: Path) -> None:
    hook = hook_in(tmp_path)
    bad: dict[str, Any] = {"loss": math.inf, "norm": math.nan, "micro_steps": (0,)}
    for step in (1, 2):
        hook.after_step(at(step, **bad), is_last=False)
    hook.after_step(at(3), is_last=False)
    for step in (4, 5):
        hook.after_step(at(step, **bad), is_last=False)
    with pytest.raises(QloraError, match="at step 6, as at every step since 4") as raised:
        hook.after_step(at(6, **bad), is_last=True)
    for part in ("loss inf, gradient norm nan (ranks 0)", "nonfinite/step-6.jsonl", "the last checkpoint is good"):
        assert part in str(raised.value)


def test_one_is_too_many_where_the_job_says_so(tmp_path: Path) -> None:
    with pytest.raises(QloraError, match="not finite at step 1") as raised:
        hook_in(tmp_path, most=1).after_step(at(1, norm=math.nan), is_last=False)
    assert raised.value.message.endswith("at step 1")


def test_an_overflow_under_a_loss_scale_is_nothing_unusual_and_a_loss_is(tmp_path: Path) -> None:
    hook = hook_in(tmp_path, skips_overflow=True, most=2)
    for step in range(1, 6):
        hook.after_step(at(step, norm=math.inf), is_last=False)
    assert not (tmp_path / "nonfinite").exists()
    hook.after_step(at(6, loss=math.nan, norm=math.inf), is_last=False)
    with pytest.raises(QloraError):
        hook.after_step(at(7, loss=math.nan, norm=math.inf), is_last=False)


def test_files_are_bounded_and_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nonfinite, "MOST_FILES", 2)
    hook = hook_in(tmp_path)
    for step in range(1, 9, 2):
        hook.after_step(at(step, norm=math.nan), is_last=False)
        hook.after_step(at(step + 1), is_last=False)
    assert sorted(file.name for file in (tmp_path / "nonfinite").iterdir()) == ["step-1.jsonl", "step-3.jsonl"]
    assert "the rows are not saved" in capsys.readouterr().err

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite, "write_file", full)
    hook_in(tmp_path).after_step(at(3, norm=math.nan), is_last=False)
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
