"""Started by a launcher in place of `-m qlora`: does several jobs, one after another, in the ranks of one launch.

Most of a small run's time is imports, so each rank imports once and forks for each job. The child is what
`python -m qlora` would be: the launcher's environment, a process group of its own, `main(argv)`, an exit code.

    several_jobs.py JOBS.json        [{"argv": [...], "port": ..., "log": ..., "prepare": [FROM, TO, STEP] or null}, ...]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path


def cut_back(source: Path, target: Path, step: int) -> None:
    """Copy a run directory as it was right after a step."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("adapter", "status.json", "LOCK"))
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    metrics = target / "metrics.jsonl"
    rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step]
    metrics.write_text("".join(f"{row}\n" for row in rows))


def run(job: dict[str, object], rank: int) -> int:
    """Do one job in a child process and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        handle = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # The launcher's own store keeps the addresses of the job before.
        os.environ |= {"MASTER_PORT": str(job["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        from qlora.cli.main import main

        code = main(job["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import_module("qlora.train.setup")
    import_module("transformers.models.llama.modeling_llama")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import_module("qlora.distributed.zero")
    rank = int(os.environ.get("RANK", "0"))
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if rank == 0 and job["prepare"]:
            source, target, step = job["prepare"]
            cut_back(Path(source), Path(target), step)
        code = run(job, rank)
        Path(f"{job['log']}.{rank}.code").write_text(str(code))


if __name__ == "__main__":
    main()
