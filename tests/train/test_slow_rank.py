"""Who is called slow, and what of a rank's time counts as its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qlora.data.sampler import Position
from qlora.distributed.runtime import Runtime
from qlora.train import slow_rank
from qlora.train.slow_rank import LEAST_SECONDS, STEPS, BusyClock, SlowRankHook
from qlora.train.step import StepResult

RESULT = StepResult(1, 0.1, 0.5, 1.5, 1e-3, 100, 6, 100, 0.25, Position(4), False)


def watch(times: Sequence[Sequence[float]]) -> SlowRankHook:
    """What the hook has heard after steps in which the ranks worked so long."""
    hook = SlowRankHook(lambda rank: f"rank {rank} (host n{rank}, pid 7)")
    for step, busy in enumerate(times):
        hook.after_step(replace(RESULT, step=step + 1, busy_seconds=tuple(busy)), is_last=False)
    return hook


def test_a_rank_that_is_slow_for_good_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert watch([(0.3, 0.8, 0.31, 0.32)] * 3 * STEPS).warned == {1}
    assert capsys.readouterr().err == (
        "warning: rank 1 (host n1, pid 7) is slow, and the others wait for it: 0.80 s of its own work a step, theirs take "
        f"0.31 s (medians of {STEPS} steps up to step {STEPS})\n"
    )


def test_of_two_ranks_the_other_one_is_the_measure() -> None:
    assert watch([(0.30, 0.46)] * STEPS).warned == {1}
    assert watch([(0.46, 0.30)] * STEPS).warned == {0}
    assert watch([(0.30, 0.44)] * STEPS).warned == set()


def test_what_is_short_or_rare_or_takes_all_alike_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert watch([(0.001, LEAST_SECONDS)] * 3 * STEPS).warned == set()
    rare = [(0.1, 5.0 if step % 3 == 0 else 0.1) for step in range(3 * STEPS)]  # saving, evaluating
    assert watch(rare).warned == set()
    assert watch([(float(step), float(step)) for step in range(3 * STEPS)]).warned == set()
    assert watch([(0.1, 9.0)] * (STEPS - 1)).warned == set()  # the first steps are warming up
    assert watch([(9.0,)] * 3 * STEPS).warned == set()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("mode", "forward_counts"), [("ddp", True), ("zero2", True), ("zero3", False)])
def test_own_work_is_what_is_not_waited(mode: str, forward_counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(slow_rank, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    runtime = Runtime(None, 1, 2, 1, torch.device("cpu"), mode)  # type: ignore[arg-type]
    clock = BusyClock(runtime)
    for _ in range(2):
        clock.restart()
        now[0] += 3  # loads rows
        now[0] += 20
        runtime.waited_seconds += 20
        clock.forward_begins()
        now[0] += 5
        clock.forward_done()
        now[0] += 30  # backward, which holds collectives
        assert clock.seconds() == (8 if forward_counts else 3)
