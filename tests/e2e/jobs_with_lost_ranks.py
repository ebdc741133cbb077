"""Started by a launcher: does several jobs as `several_jobs.py` does, in each of which a rank is lost, or is slow, or only
pauses, at a place of its own.

    jobs_with_lost_ranks.py JOBS.json
    [{"argv": [...], "port": ..., "log": ..., "place": name}, ...]

It leaves LOG.r and LOG.r.end, with the exit code of rank r and the time, and LOG.lost, the time when it happened.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from jobs_with_stops import at_call, module
from several_jobs import run


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
            Path(f"{job['log']}.lost").write_text(str(time.time()))
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


def main() -> None:
    import_module("qlora.train.setup")
    import_module("transformers.models.llama.modeling_llama")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import_module("qlora.distributed.zero")
    rank = int(os.environ["RANK"])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            code = 70
            try:
                bring_about(job, rank)
                code = run(job, rank)
            finally:
                os._exit(code if code >= 0 else 128 - code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        Path(f"{job['log']}.{rank}.end").write_text(json.dumps([code, time.time()]))


if __name__ == "__main__":
    main()
