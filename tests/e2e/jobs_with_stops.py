"""Started by a launcher: does several jobs as `several_jobs.py` does, in each of which something asks a rank to stop, or
puts a number that is none into training, at a place of its own.

    jobs_with_stops.py JOBS.json
    [{"argv": [...], "port": ..., "log": ..., "run_dir": ..., "place": name}, ...]

It leaves LOG.r and LOG.r.end, with the exit code of rank r and the time, and LOG.happened, the time of the request.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from several_jobs import cut_back, do_jobs_with, note_the_time


def module(name: str) -> Any:
    return import_module(f"qlora.{name}")


def at_call(owner: Any, name: str, number: int, do: Callable[[], None]) -> None:
    """Do something at the number-th call of a function, before it."""
    function, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def do_and_call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            do()
        return function(*args, **kwargs)

    setattr(owner, name, do_and_call)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.2)


def in_evaluation(do: Callable[[], None]) -> None:
    """Do something before the third batch of the first evaluation."""
    loader = module("data.loader").EvalLoader
    batches, seen = loader.__iter__, []

    def batches_and_do(self: Any) -> Iterator[Any]:
        for batch in batches(self):
            seen.append(batch)
            if len(seen) == 3:
                do()
            yield batch

    loader.__iter__ = batches_and_do


def spoil(steps: dict[int, str], num_micro_steps: int) -> None:
    """Let the loss of some steps be no number in their first micro-step, or infinite with a gradient that is finite."""
    model = module("objective.train_model").TrainModel
    forward, calls = model.forward, iter(range(1_000_000))

    def spoiled(self: Any, batch: Any) -> Any:
        loss_sum, num_targets = forward(self, batch)
        if not loss_sum.requires_grad:
            return loss_sum, num_targets
        step, micro_step = divmod(next(calls), num_micro_steps)
        kind = steps.get(step + 1) if micro_step == 0 else None
        if kind == "nan":
            loss_sum = loss_sum * float("nan")
        elif kind == "inf":
            loss_sum = loss_sum + float("inf")
        elif kind == "gradient":
            loss_sum.register_hook(lambda gradient: gradient * float("inf"))
        return loss_sum, num_targets

    model.forward = spoiled


def bring_about(job: dict[str, Any], rank: int) -> None:
    def ask(*numbers: int) -> Callable[[], None]:
        def asks() -> None:
            note_the_time(job)
            send(*numbers)

        return asks

    def write_stop_file() -> None:
        Path(job["run_dir"], "STOP").touch()
        ask()()
        time.sleep(2.0)

    entry = module("quant.shards").TensorEntry
    place = job["place"]
    if place == "resumed" and rank == 0:  # goes on from where the first job was after three steps
        run_dir = Path(job["run_dir"])
        cut_back(run_dir.with_name("run0"), run_dir, 3)
    elif place == "tokenizing":  # on each rank, as from a launcher: they have not met
        at_call(module("data.prepare"), "encode_rows", 1, ask(signal.SIGTERM))
    elif place == "loading" and rank == 1:
        at_call(entry, "read", 3, ask(signal.SIGTERM))
    elif place == "loading, by the file" and rank == 1:
        at_call(entry, "read", 3, write_stop_file)
    elif place == "settling" and rank == 0:
        at_call(module("objective.train_model").TrainModel, "settle", 1, ask(signal.SIGINT))
    elif place == "evaluating" and rank == 1:
        in_evaluation(ask(signal.SIGUSR1))
    elif place == "saving" and rank == 0:
        at_call(module("checkpoint.save"), "_write", 2, ask(signal.SIGTERM))
    elif place == "twice" and rank == 0:
        module("train.preempt").SAME_REQUEST_SECONDS = 0.1
        in_evaluation(ask(signal.SIGTERM, signal.SIGTERM))
    elif place == "once" and rank == 1:
        spoil({2: "nan"}, num_micro_steps=2)
    elif place == "not finite" and rank == 1:
        spoil({2: "nan", 4: "inf", 6: "gradient", 8: "nan", 9: "inf"}, num_micro_steps=2)


if __name__ == "__main__":
    do_jobs_with(bring_about)
