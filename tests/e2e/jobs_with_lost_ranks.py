"""Started by a launcher: does several jobs as `several_jobs.py` does, in each of which a rank is lost, or is slow, or only
pauses, at a place of its own.

    jobs_with_lost_ranks.py JOBS.json
    [{"argv": [...], "port": ..., "log": ..., "run_dir": ..., "place": name}, ...]

It leaves LOG.r and LOG.r.end, with the exit code of rank r and the time, and LOG.happened, the time when it happened.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from jobs_with_stops import at_call, module
from several_jobs import do_jobs_with, note_the_time


def at_every_call(owner: Any, name: str, do: Callable[[], None]) -> None:
    function = getattr(owner, name)

    def do_and_call(*args: Any, **kwargs: Any) -> Any:
        do()
        return function(*args, **kwargs)

    setattr(owner, name, do_and_call)


def fail() -> None:
    raise ValueError("a bug of ours\nin two lines")


def bring_about(job: dict[str, Any], rank: int) -> None:
    def lost(do: Callable[[], None]) -> Callable[[], None]:
        def note_and_do() -> None:
            note_the_time(job)
            do()

        return note_and_do

    model = module("objective.train_model").TrainModel
    place = job["place"]
    if rank == 1:
        if place == "hangs":
            at_call(model, "forward", 8, lost(lambda: time.sleep(600)))
        elif place == "hangs while loading":
            at_call(module("quant.shards").TensorEntry, "read", 3, lost(lambda: time.sleep(600)))
        elif place == "hangs after a step":
            at_call(module("train.nonfinite").NonFiniteHook, "after_step", 3, lost(lambda: time.sleep(600)))
        elif place == "fails":
            at_call(model, "forward", 8, lost(fail))
        elif place == "fails while tokenizing":
            at_call(module("train.inputs"), "tokenize", 1, lambda: (time.sleep(6), lost(fail)()))  # rank 0 is up by then
        elif place == "slow":
            at_every_call(model, "forward", lambda: time.sleep(0.15))
        elif place == "pauses":
            at_call(model, "forward", 8, lambda: time.sleep(3.5))
            at_call(module("train.inputs"), "tokenize", 1, lambda: time.sleep(8))
    elif place == "main killed":
        at_call(model, "forward", 8, lost(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    elif place == "main hangs":
        at_call(model, "forward", 8, lost(lambda: time.sleep(600)))
    elif place == "main fails":
        at_call(model, "forward", 8, lost(fail))


if __name__ == "__main__":
    do_jobs_with(bring_about)
