"""Started by a launcher: does several jobs as `several_jobs.py` does, each with something that goes wrong on rank 1.

    jobs_with_faults.py JOBS.json
    [{"argv": [...], "port": ..., "log": ..., "folder": folder or null, "fault": name or null}, ...]

Rank r works in FOLDER/r, so that a relative path is another file on each rank. It leaves LOG.r and LOG.r.end, with its
exit code and the time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from several_jobs import do_jobs_with


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


def bring_about(job: dict[str, Any], rank: int) -> None:
    # The launch file names it from the working directory.
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = os.path.abspath(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    if job["folder"]:
        os.chdir(Path(job["folder"]) / str(rank))
    errors: Any = import_module("qlora.errors")
    fault = job["fault"] if rank == 1 else None
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


if __name__ == "__main__":
    do_jobs_with(bring_about)
