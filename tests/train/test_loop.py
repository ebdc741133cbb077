"""The loop and its hooks with everything else replaced by recorders."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.config.schema import JobConfig
from qlora.data.batch import empty_batch
from qlora.data.loader import StepBatches
from qlora.data.sampler import Position
from qlora.distributed.runtime import Runtime
from qlora.errors import StopRequested
from qlora.train.hooks import CheckpointHook, EvaluateHook, MetricsHook, ProgressHook, StatusHook
from qlora.train.loop import Job, train
from qlora.train.run_dir import MetricsWriter
from qlora.train.step import Counters, StepResult, run_step, seed_step


class Engine:
    """Says what it was asked for; losses and norms come from lists."""

    skips_overflow = False

    def __init__(self, losses: list[float] | None = None, norms: list[float] | None = None) -> None:
        self.losses, self.norms, self.calls = losses or [], norms or [], list[Any]()
        self.parameters: dict[str, torch.nn.Parameter] = {}

    def model(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("forward")
        return torch.tensor(self.losses.pop(0) if self.losses else 3.0), torch.tensor(0)

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self.calls.append(("micro", last))
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append(("backward", float(loss)))

    def step(self, learning_rate: float) -> torch.Tensor:
        self.calls.append(("step", learning_rate))
        return torch.tensor(self.norms.pop(0) if self.norms else 1.0)


class Loader:
    """Steps of two micro-batches, 4 packs, 100 tokens and 6 targets over all ranks."""

    schedule = SimpleNamespace(step_at=lambda position: position.global_index // 4)

    def batches(self, position: Position) -> Iterator[StepBatches]:
        while True:
            step = position.global_index // 4
            position = Position(position.global_index + 4)
            micro = (empty_batch(0, is_packed=True),) * 2
            yield StepBatches(step, (step + 1) / 8, micro, position, 100, 6)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, num_steps: int, first: int) -> None:
        self.calls.append(("start", num_steps, first))

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        self.calls.append((result.step, is_last))

    def finish(self, result: StepResult | None, outcome: str) -> None:
        self.calls.append((None if result is None else result.step, outcome))


class Alone(Runtime):
    """One of two ranks, whose numbers are sums already."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


RUNTIME = Alone(None, rank=0, world_size=2, local_rank=0, device=torch.device("cpu"), mode="ddp")  # type: ignore[arg-type]


def job(engine: Engine, hooks: list[Any], *, num_steps: int = 3, first: int = 0, stop_at: int | None = None) -> Job:
    def requested() -> bool:
        return stop_at is not None and sum(call[0] == "step" for call in engine.calls) >= stop_at

    stop = SimpleNamespace(requested=requested)
    return Job(JobConfig(), RUNTIME, engine, Loader(), hooks, num_steps, Position(4 * first), Counters(), stop)


def test_a_run_in_order() -> None:
    engine, hook = Engine(), Recorder()
    assert train(job(engine, [hook])) == "done"
    assert hook.calls == [("start", 3, 0), (1, False), (2, False), (3, True), (3, "done")]
    assert [c[0] if isinstance(c, tuple) else c for c in engine.calls[:7]] == [
        "micro", "forward", "backward", "micro", "forward", "backward", "step",
    ]  # fmt: skip
    assert [c[1] for c in engine.calls if c[0] == "micro"] == [False, True] * 3


def test_a_resumed_run_starts_where_it_stood_and_a_finished_one_does_nothing() -> None:
    hook = Recorder()
    train(job(Engine(), [hook], first=2))
    assert hook.calls == [("start", 3, 2), (3, True), (3, "done")]
    engine, hook = Engine(), Recorder()
    assert train(job(engine, [hook], first=3)) == "done"
    assert (engine.calls, hook.calls) == ([], [("start", 3, 3), (None, "done")])


def test_a_request_during_a_step_stops_after_that_step() -> None:
    hook = Recorder()
    assert train(job(Engine(), [hook], num_steps=9, stop_at=2)) == "stopped"
    assert hook.calls == [("start", 9, 0), (1, False), (2, False), (2, "stopped")]


def test_a_request_during_the_last_step_changes_nothing() -> None:
    hook = Recorder()
    assert train(job(Engine(), [hook], num_steps=2, stop_at=2)) == "done"


def test_an_evaluation_that_is_left_ends_the_run_after_its_step() -> None:
    class Left(Recorder):
        def after_step(self, result: StepResult, *, is_last: bool) -> None:
            super().after_step(result, is_last=is_last)
            if result.step == 2:
                raise StopRequested

    hook = Left()
    assert train(job(Engine(), [hook], num_steps=9)) == "stopped"
    assert hook.calls[-2:] == [(2, False), (2, "stopped")]
    last = Left()
    assert train(job(Engine(), [last], num_steps=2)) == "done"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_none(bad: float) -> None:
    engine, counters = Engine([2.0, bad], [math.nan]), Counters()
    result = run_step(engine, RUNTIME, next(Loader().batches(Position(0))), counters, learning_rate=0.1, seed=0)
    first, second = [call[1] for call in engine.calls if call[0] == "backward"]
    assert first == pytest.approx(2.0 * 2 / 6)
    assert math.isnan(second)
    assert (result.skipped, result.num_skipped, result.nonfinite_micro_steps) == (True, 1, (1,))
    assert not math.isfinite(result.loss)
    good = run_step(Engine(), RUNTIME, next(Loader().batches(Position(4))), counters, learning_rate=0.1, seed=0)
    assert (good.skipped, good.num_skipped, good.nonfinite_micro_steps) == (False, 1, ())


def test_a_gradient_that_is_not_finite_is_a_skipped_step() -> None:
    engine = Engine([], [math.inf])
    result = run_step(engine, RUNTIME, next(Loader().batches(Position(0))), Counters(), learning_rate=0.1, seed=0)
    assert (result.skipped, result.nonfinite_micro_steps) == (True, ())


def test_a_step_sums_losses_and_scales_gradients_by_the_global_count() -> None:
    engine, counters = Engine([2.0, 4.0]), Counters(1000, 50)
    batches = next(Loader().batches(Position(0)))
    result = run_step(engine, RUNTIME, batches, counters, learning_rate=0.1, seed=0)
    assert result.loss == pytest.approx(6.0 / 6)
    # Two ranks will average what each of them adds.
    assert [c[1] for c in engine.calls if c[0] == "backward"] == pytest.approx([2.0 * 2 / 6, 4.0 * 2 / 6])
    assert (result.num_tokens, result.num_target_tokens, result.step_tokens) == (1100, 56, 100)
    assert (result.step, result.epoch, result.position) == (1, 1 / 8, Position(4))


def test_what_is_drawn_depends_on_place_alone() -> None:
    draws = {}
    for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        seed_step(*place)
        draws[place] = torch.rand(3).tolist()
        seed_step(*place)
        assert torch.rand(3).tolist() == draws[place]
    assert len({tuple(values) for values in draws.values()}) == 5


# Hooks


def result_at(step: int) -> StepResult:
    return StepResult(step, step / 8, 0.5, 1.5, 1e-3, 100 * step, 6 * step, 100, 0.25, Position(4 * step), False)


def drive(hook: Any, num_steps: int, stop_at: int | None = None) -> None:
    last = None
    for step in range(1, (stop_at or num_steps) + 1):
        last = result_at(step)
        hook.after_step(last, is_last=step == num_steps)
    hook.finish(last, "stopped" if stop_at else "done")


@pytest.mark.parametrize(
    ("every", "stop_at", "wanted"),
    [(2, None, [2, 4, 5]), (None, None, [5]), (5, None, [5]), (2, 3, [2, 3]), (2, 4, [2, 4]), (None, 1, [1])],
)
def test_checkpoints_come_in_their_turn_at_the_end_and_on_a_stop_once(
    every: int | None, stop_at: int | None, wanted: list[int]
) -> None:
    saved: list[int] = []
    waited: list[list[int]] = []
    hook = CheckpointHook(every, lambda result: saved.append(result.step), lambda: waited.append(list(saved)))
    drive(hook, 5, stop_at)
    assert saved == wanted
    assert waited == [wanted]  # once, when all is handed over
    hook.finish(None, "done")
    assert saved == wanted


def test_evaluation_comes_in_its_turn_and_at_the_end(tmp_path: Path) -> None:
    values = {"eval_loss": 1.0, "eval_perplexity": math.e, "eval_num_target_tokens": 3}
    for every, wanted in ((2, [2, 4, 5]), (None, [5])):
        path = tmp_path / f"{every}.jsonl"
        drive(EvaluateHook(every, lambda: values, MetricsWriter(path)), 5)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows == [{"step": step, **values} for step in wanted]


def test_metrics_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    drive(MetricsHook(MetricsWriter(path), 2, lambda: 7), 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[0]["tokens_per_second"] == 400
    assert rows[0]["peak_memory_bytes"] == 7


def test_progress_is_a_line_a_step_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hook = ProgressHook(2, lambda: 2**30)
    hook.start(5, 0)
    drive(hook, 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "400 tok/s  1.00 GiB" in lines[0]


def test_status_is_written_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("qlora.train.hooks.time.monotonic", lambda: now[0])
    written: list[int] = []
    hook = StatusHook(lambda result: written.append(result.step))
    for step in range(1, 5):
        hook.after_step(result_at(step), is_last=step == 4)
        now[0] += 3.0
    assert written == [1, 3, 4]


def test_a_skipped_step_has_its_row_which_is_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hook = MetricsHook(MetricsWriter(path), 10, lambda: 7)
    skipped = replace(result_at(3), loss=math.nan, grad_norm=math.inf, skipped=True, num_skipped=2)
    hook.after_step(skipped, is_last=False)
    hook.after_step(result_at(4), is_last=False)
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (row["step"], row["loss"], row["grad_norm"], row["num_skipped_steps"]) == (3, None, None, 2)
