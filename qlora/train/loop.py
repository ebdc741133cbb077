"""The training loop, whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.config.schema import JobConfig
from qlora.data.ahead import Ahead
from qlora.data.loader import TrainLoader
from qlora.data.sampler import Position
from qlora.distributed.engine import Engine
from qlora.distributed.runtime import Runtime
from qlora.errors import StopRequested
from qlora.train import out_of_memory
from qlora.train.hooks import Hook
from qlora.train.optim import learning_rate_at
from qlora.train.preempt import StopFlag
from qlora.train.slow_rank import BusyClock
from qlora.train.step import Counters, StepResult, run_step


@dataclass
class Job:
    """Everything a run consists of, put together by `train.setup`."""

    config: JobConfig
    runtime: Runtime
    engine: Engine
    loader: TrainLoader
    hooks: Sequence[Hook]
    num_steps: int
    position: Position
    counters: Counters
    stop: StopFlag


def train(job: Job) -> Literal["done", "stopped"]:
    """Train to the last step, or until a rank is asked to stop. Collective.

    Raises:
        QloraError: of a hook, on every rank: the loss is not finite any more, or a checkpoint cannot be written.
        OutOfMemory: on the rank whose memory has run out.
    """
    first = job.loader.schedule.step_at(job.position)
    for hook in job.hooks:
        hook.start(job.num_steps, first)
    outcome: Literal["done", "stopped"] = "done"
    result: StepResult | None = None
    clock = BusyClock(job.runtime)
    if first < job.num_steps:
        steps = Ahead(job.loader.batches(job.position), lambda batches: batches.to(job.runtime.device))
        for batches in steps:
            with out_of_memory.explained(job.config, job.runtime, f"in step {batches.step + 1}", loader=job.loader):
                result = run_step(
                    job.engine,
                    job.runtime,
                    batches,
                    job.counters,
                    learning_rate=learning_rate_at(batches.step, job.config.train, job.num_steps),
                    seed=job.config.train.seed,
                    stop_requested=job.stop.requested,
                    meanwhile=steps.prepare if batches.step + 1 < job.num_steps else lambda: None,
                    clock=clock,
                )
            is_last = result.step >= job.num_steps
            stops = result.stop_requested
            try:
                with out_of_memory.explained(job.config, job.runtime, f"after step {result.step}", loader=job.loader):
                    for hook in job.hooks:
                        hook.after_step(result, is_last=is_last)
            except StopRequested:  # raised on every rank, in the evaluation
                stops = True
            if is_last:
                break
            if stops:
                outcome = "stopped"
                break
    for hook in job.hooks:
        hook.finish(result, outcome)
    return outcome
