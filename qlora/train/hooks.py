"""What happens beside training: progress, metrics, evaluation, checkpoints. Hooks read; they never change the loop.

Every rank has the same hooks in the same order, because evaluation and checkpoints are collectives; a hook that writes
does so on the main rank alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from qlora.errors import StopRequested
from qlora.train.run_dir import MetricsWriter
from qlora.train.step import StepResult

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Hook(Protocol):
    """Called by the loop on every rank."""

    def start(self, num_steps: int, first: int) -> None:
        """Before the first step; `first` steps are done already."""

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        """After each step."""

    def finish(self, result: StepResult | None, outcome: str) -> None:
        """After the last; `result` is None where there was no step left to do."""


class SilentHook:
    """Does nothing; what the other hooks start from."""

    def start(self, num_steps: int, first: int) -> None:
        return

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        return

    def finish(self, result: StepResult | None, outcome: str) -> None:
        return


class ProgressHook(SilentHook):
    """A bar on a terminal, a line a step elsewhere. Main rank only."""

    def __init__(self, every_steps: int, peak_memory: Callable[[], int]) -> None:
        self.every_steps, self.peak_memory = every_steps, peak_memory
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.num_steps = self.first = 0
        self.began = 0.0

    def start(self, num_steps: int, first: int) -> None:
        self.num_steps, self.first, self.began = num_steps, first, time.perf_counter()
        if not sys.stdout.isatty():
            return
        from rich import progress

        self.progress = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("train", total=num_steps, completed=first, text="")
        self.progress.start()

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        speed = result.step_tokens / result.step_seconds
        text = (
            f"loss {result.loss:.4f}  norm {result.grad_norm:.3f}  lr {result.learning_rate:.2e}  "
            f"{speed:,.0f} tok/s  {self.peak_memory() / 2**30:.2f} GiB"
        )
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=result.step, text=text)
        elif result.step % self.every_steps == 0 or is_last:
            rest = (time.perf_counter() - self.began) / (result.step - self.first) * (self.num_steps - result.step)
            minutes, seconds = divmod(int(rest), 60)
            print(f"step {result.step}/{self.num_steps}  {text}  eta {minutes}:{seconds:02d}", flush=True)

    def finish(self, result: StepResult | None, outcome: str) -> None:
        if self.progress is not None:
            self.progress.stop()


class MetricsHook(SilentHook):
    """A row of metrics.jsonl, and of the trackers, every few steps and for every skipped one. Main rank only."""

    def __init__(self, writer: MetricsWriter, every_steps: int, peak_memory: Callable[[], int]) -> None:
        self.writer, self.every_steps, self.peak_memory = writer, every_steps, peak_memory

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        if result.step % self.every_steps and not is_last and not result.skipped:
            return
        self.writer.write(
            {
                "step": result.step,
                "epoch": result.epoch,
                "loss": _number(result.loss),
                "grad_norm": _number(result.grad_norm),
                "learning_rate": result.learning_rate,
                "num_tokens": result.num_tokens,
                "num_target_tokens": result.num_target_tokens,
                "tokens_per_second": result.step_tokens / result.step_seconds,
                "step_seconds": result.step_seconds,
                "num_skipped_steps": result.num_skipped,
                "peak_memory_bytes": self.peak_memory(),
                "time": time.time(),
            }
        )


def _number(value: float) -> float | None:
    """What JSON has no number for is null."""
    return value if math.isfinite(value) else None


class StatusHook(SilentHook):
    """Keeps status.json near the truth while the run goes on. Main rank only."""

    SECONDS = 5.0

    def __init__(self, write: Callable[[StepResult], Any]) -> None:
        self.write, self.last = write, 0.0

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        if time.monotonic() - self.last > self.SECONDS or is_last or result.skipped:
            self.write(result)
            self.last = time.monotonic()


class EvaluateHook(SilentHook):
    """Loss on the evaluation data every few steps and after the last. Collective.

    Comes last of the hooks: where a rank is asked to stop it is left, on all ranks, by StopRequested.
    """

    def __init__(
        self, every_steps: int | None, evaluate: Callable[[], dict[str, float]], writer: MetricsWriter | None
    ) -> None:
        self.every_steps, self.evaluate, self.writer = every_steps, evaluate, writer

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        if not is_last and (self.every_steps is None or result.step % self.every_steps):
            return
        try:
            values = self.evaluate()
        except StopRequested:
            if self.writer is not None:
                print(f"step {result.step}  evaluation left: a stop was asked for", flush=True)
            raise
        if self.writer is not None:
            self.writer.write({"step": result.step, **values})
            print(f"step {result.step}  eval loss {values['eval_loss']:.4f}", flush=True)


class CheckpointHook(SilentHook):
    """A checkpoint every few steps, after the last, and on a stop. Collective.

    Args:
        save: begins to save.
        wait: waits until all is saved.
    """

    def __init__(self, every_steps: int | None, save: Callable[[StepResult], Any], wait: Callable[[], Any]) -> None:
        self.every_steps, self.save, self.wait, self.saved = every_steps, save, wait, 0

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        if is_last or (self.every_steps is not None and result.step % self.every_steps == 0):
            self.save(result)
            self.saved = result.step

    def finish(self, result: StepResult | None, outcome: str) -> None:
        if result is not None and self.saved != result.step:
            self.save(result)
        self.wait()
