"""Whether one rank works longer than the others, which all wait for it at every step.

A rank's own work is measured from the end of a step's sum to the end of the first forward pass of the next, less what it
waits for others in between: loading, hooks, and a forward pass on its own device. Later passes and updates hold
collectives, in which the fast wait for the slow and all take equally long. Where ranks share the base (zero3) the forward
pass holds some too, and only what comes before it is measured: a slow device is not seen there.

The numbers travel in the sum that ends every step.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import median

import torch

from qlora.distributed.runtime import Runtime
from qlora.train.hooks import SilentHook
from qlora.train.step import StepResult

STEPS = 20
RATIO = 1.5
LEAST_SECONDS = 0.05  # what a busy machine may take from anyone


class BusyClock:
    """Times this rank's own work in a step. Rank-local."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._on_gpu = runtime.device.type == "cuda"
        self._marks: list[torch.cuda.Event] = []
        self._ahead_seconds = self._next_ahead_seconds = 0.0
        self.restart()

    def restart(self) -> None:
        """A step has ended on all ranks."""
        self._host_seconds = 0.0
        self._began, self._waited = time.perf_counter(), self._runtime.waited_seconds

    def worked_ahead(self, seconds: float) -> None:
        """Work of the next step was done before this one has ended."""
        self._next_ahead_seconds = seconds

    def forward_begins(self) -> None:
        """The first forward pass of a step begins."""
        self._ahead_seconds, self._next_ahead_seconds = self._next_ahead_seconds, 0.0
        self._host_seconds = self._own_seconds()
        self._marks = []
        self._mark()

    def forward_done(self) -> None:
        """It is computed, or queued on a GPU."""
        if self._runtime.is_sharded:
            return
        if self._on_gpu:
            self._mark()
        else:
            self._host_seconds = self._own_seconds()

    def _own_seconds(self) -> float:
        waited = self._runtime.waited_seconds - self._waited
        return self._ahead_seconds + time.perf_counter() - self._began - waited

    def seconds(self) -> float:
        """Of this step; once the gradient's norm was read, so that a GPU need not be waited for."""
        on_gpu = self._marks[0].elapsed_time(self._marks[1]) / 1000 if len(self._marks) == 2 else 0.0
        return self._host_seconds + on_gpu

    def _mark(self) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()


class SlowRankHook(SilentHook):
    """Warns once of each rank that works longer than the others. Main rank only.

    Args:
        name_of: a rank as a person looks for it.
    """

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self.name_of = name_of
        self.last: deque[tuple[float, ...]] = deque(maxlen=STEPS)
        self.warned: set[int] = set()

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        self.last.append(result.busy_seconds)
        if len(self.last) < STEPS or len(result.busy_seconds) < 2:
            return
        typical = [median(times) for times in zip(*self.last, strict=True)]
        for rank, own in enumerate(typical):
            others = median(typical[:rank] + typical[rank + 1 :])
            if rank not in self.warned and own > RATIO * others and own - others > LEAST_SECONDS:
                self.warned.add(rank)
                print(
                    f"warning: {self.name_of(rank)} is slow, and the others wait for it: {own:.2f} s of its own work a "
                    f"step, theirs take {others:.2f} s (medians of {STEPS} steps up to step {result.step})",
                    file=sys.stderr,
                    flush=True,
                )
