"""Started by a launcher in place of `-m qlora`: does several jobs, one after another, in the ranks of one launch.

Most of a small run's time is imports, so each rank imports once and forks for each job. The child is what
`python -m qlora` would be: the launcher's environment, a process group of its own, `main(argv)`, an exit code.

    several_jobs.py JOBS.json        [{"argv": [...], "port": ..., "log": ..., "prepare": [FROM, TO, STEP] or null}, ...]

The scripts `jobs_with_*.py` do jobs in the same way, in each of which something happens (`do_jobs_with`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def cut_back(source: Path, target: Path, step: int) -> None:
    """Copy a run directory as it was right after a step."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("adapter", "status.json", "LOCK"))
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    metrics = target / "metrics.jsonl"
    rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step]
    metrics.write_text("".join(f"{row}\n" for row in rows))


def in_child(work: Callable[[], int]) -> int:
    """Run a function in a child process. Its exit code, 70 where it raises, or minus the signal that killed it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        code = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if code >= 0 else 128 - code)


def run(job: dict[str, Any], rank: int) -> int:
    """Do one job in a child process and return its exit code."""

    def work() -> int:
        handle = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # The launcher's own store keeps the addresses of the job before.
        os.environ |= {"MASTER_PORT": str(job["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        from qlora.cli.main import main

        return main(job["argv"])

    return in_child(work)


def run_with(job: dict[str, Any], rank: int, bring_about: Callable[[dict[str, Any], int], None]) -> int:
    """The same where something is to happen. What is patched for it is patched in a process that `run` forks again."""

    def work() -> int:
        bring_about(job, rank)
        return run(job, rank)

    return in_child(work)


def import_once() -> None:
    """Import what every job needs, before the first is forked."""
    import_module("qlora.train.setup")
    import_module("transformers.models.llama.modeling_llama")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import_module("qlora.distributed.zero")


def do_jobs_with(bring_about: Callable[[dict[str, Any], int], None]) -> None:
    """Do the jobs of the table that the command line names, each with what `bring_about(job, rank)` prepares in its process.

    Leaves LOG.r and LOG.r.end, with the exit code of rank r and the time.
    """
    import_once()
    rank = int(os.environ["RANK"])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        code = run_with(job, rank, bring_about)
        Path(f"{job['log']}.{rank}.end").write_text(json.dumps([code, time.time()]))


def note_the_time(job: dict[str, Any]) -> None:
    """Leave LOG.happened, the time when it happened."""
    Path(f"{job['log']}.happened").write_text(str(time.time()))


def main() -> None:
    import_once()
    rank = int(os.environ.get("RANK", "0"))
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if rank == 0 and job["prepare"]:
            source, target, step = job["prepare"]
            cut_back(Path(source), Path(target), step)
        code = run(job, rank)
        Path(f"{job['log']}.{rank}.code").write_text(str(code))


if __name__ == "__main__":
    main()
