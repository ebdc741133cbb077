"""Started by a launcher: does several jobs as `several_jobs.py` does, each with something that goes wrong on rank 1.

    jobs_with_faults.py JOBS.json
    [{"argv": [...], "port": ..., "log": ..., "folder": folder or null, "fault": name or null}, ...]

Rank r works in FOLDER/r, so that a relative path is another file on each rank. It leaves LOG.r and LOG.r.end, with its
exit code and the time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from several_jobs import run


def fail_at_fifth_read(error: Exception) -> None:
    """Let the fifth read of a tensor raise."""
    shards: Any = import_module("qlora.quant.shards")
    read, calls = shards.TensorEntry.read, iter(range(1, 1000))

    def read_or_fail(*args: Any) -> Any:
        if next(calls) == 5:
            raise error
        return read(*args)

    shards.TensorEntry.read = read_or_fail


def spoil_files(spoil: Callable[[Path], None]) -> None:
    """Do something to every file of weights here when their headers have been read."""
    room: Any = import_module("qlora.quant.room")
    check = room.check_room

    def check_and_spoil(*args: Any) -> None:
        check(*args)
        for file in Path("base").glob("*.safetensors"):
            spoil(file)

    room.check_room = check_and_spoil


def remove_files_after_the_start() -> None:
    """Remove every file of weights here when the ranks have met, before the base is opened."""
    processes: Any = import_module("qlora.distributed.runtime")
    start = processes.start

    def start_and_remove(**kwargs: Any) -> Any:
        runtime = start(**kwargs)
        for file in Path("base").glob("*.safetensors"):
            file.unlink()
        return runtime

    processes.start = start_and_remove


def bring_about(fault: str) -> None:
    errors: Any = import_module("qlora.errors")
    if fault == "unreadable":
        fail_at_fifth_read(errors.BaseModelError("cannot be read (Input/output error)", place="model.safetensors"))
    elif fault == "bug":
        fail_at_fifth_read(ValueError("a bug of ours"))
    elif fault == "gone early":
        remove_files_after_the_start()
    elif fault == "cut short":
        spoil_files(lambda file: os.truncate(file, file.stat().st_size // 2))
    elif fault == "gone":
        spoil_files(lambda file: file.unlink())


def run_with_fault(job: dict[str, Any], rank: int) -> int:
    """The job's exit code. What is patched is patched in a process of its own, which `run` forks again."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        if job["folder"]:
            os.chdir(Path(job["folder"]) / str(rank))
        if job["fault"] and rank == 1:
            bring_about(job["fault"])
        code = run(job, rank)
    finally:
        os._exit(code)


def main() -> None:
    import_module("qlora.train.setup")
    import_module("qlora.distributed.zero")
    import_module("transformers.models.llama.modeling_llama")
    # The launch file names it from the working directory.
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = os.path.abspath(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    rank = int(os.environ["RANK"])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        code = run_with_fault(job, rank)
        Path(f"{job['log']}.{rank}.end").write_text(json.dumps([code, time.time()]))


if __name__ == "__main__":
    main()
