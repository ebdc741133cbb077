"""Forks the ranks of one start, does to them what a fault says, and waits as a launcher does.

The process that forks has imported everything, has one thread and no process group. Each rank is then what
`python -m qlora` is under `accelerate launch`: that environment, `main(argv)`, an exit code; and it is really killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from faults import Fault, FileWatch, watch_steps
from launches import ROOT, Launches, World, free_port

# After one rank is gone the launcher gives the others as long, and then kills them.
END_SECONDS = 30.0
LIMIT_SECONDS = 180.0
MODULES = (
    "qlora.train.setup",
    "qlora.distributed.zero",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
)


def import_everything() -> None:
    """What takes a rank its first seconds."""
    for name in MODULES:
        import_module(name)


@dataclass(frozen=True)
class Start:
    """One start of the job.

    Args:
        number: of this start in its run; its files are `folder/NUMBER.*`.
        is_broken: the commit protocol is switched off.
    """

    number: int
    world: World
    argv: list[str]
    run_dir: Path
    folder: Path
    fault: Fault | None = None
    is_broken: bool = False

    def log(self, rank: int) -> Path:
        return self.folder / f"{self.number}.{rank}.log"

    def seen(self, rank: int) -> Path:
        return self.folder / f"{self.number}.{rank}.seen"

    @property
    def note(self) -> Path:
        return self.folder / f"{self.number}.killed"


@dataclass
class Outcome:
    """How a start ended: each rank's code, what was killed and when, and who did not end by itself."""

    codes: list[int]
    killed: str | None
    seconds: float
    stuck: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return not any(self.codes)


def run(start: Start, launches: Launches) -> Outcome:
    """Do one start and wait for the end of all its ranks."""
    port, world = free_port(), start.world
    environments = [launches.environment(world, rank, port) for rank in range(world.num_ranks)]
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("the process that forks has threads")
    began, pids = time.monotonic(), []
    for rank, environment in enumerate(environments):
        pid = os.fork()
        if pid == 0:
            _be_rank(start, rank, environment, pids[0] if pids else 0)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    codes = _wait(start, pids)
    killed = start.note.read_text() if start.note.exists() else None
    stuck = [rank for rank in range(world.num_ranks) if (start.folder / f"{start.number}.{rank}.stuck").exists()]
    return Outcome(codes, killed, time.monotonic() - began, stuck)


def _be_rank(start: Start, rank: int, environment: dict[str, str], group: int) -> NoReturn:
    code = 70
    try:
        os.setpgid(0, group)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        handle = os.open(start.log(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(ROOT)
        os.environ.clear()
        os.environ.update(environment)
        if start.is_broken:
            import_module("broken").switch_off_the_protocol()
        watch_steps(start.fault, start.note, start.seen(rank), rank)
        if rank == 0:
            FileWatch(start.run_dir, start.fault, start.note).install()
        from qlora.cli.main import main
        from qlora.distributed.leave import leave

        code = main(start.argv)
        leave(code)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(start: Start, pids: list[int]) -> list[int]:
    """Be the launcher: reap, hand on that one is gone, and kill what does not end."""
    fault = start.fault or Fault("none")
    running = dict(enumerate(pids))
    codes: dict[int, int] = {}
    began = time.monotonic()
    first_step: float | None = None
    first_end: float | None = None
    outside = _from_outside(start, pids)
    try:
        while running:
            now = time.monotonic()
            for rank, pid in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    del running[rank]
                    if codes[rank] and first_end is None:
                        first_end = now
                        if not fault.no_launcher:
                            _send(running, signal.SIGTERM)
            if first_step is None and start.seen(0).exists() and start.seen(0).stat().st_size:
                first_step = now
            since = began if fault.since == "start" else first_step
            while outside and since is not None and len(running) == len(pids) and now - since >= outside[0][0]:
                outside.pop(0)[1]()
            if now - (first_end or now) > END_SECONDS or now - began > LIMIT_SECONDS:
                for rank in running:
                    (start.folder / f"{start.number}.{rank}.stuck").touch()
                _send(running, signal.SIGKILL)
            time.sleep(0.005)
    finally:
        _send(running, signal.SIGKILL)
    return [codes[rank] for rank in range(len(pids))]


def _from_outside(start: Start, pids: list[int]) -> list[tuple[float, Callable[[], None]]]:
    """What is done to a start at a time: seconds after the fault's `since`, and the deed."""
    fault = start.fault
    if fault is None or fault.kind not in ("time", "stop"):
        return []
    running = dict(enumerate(pids))

    def kill() -> None:
        what = f"{fault.seconds:.2f} s after the {fault.since}"
        start.note.write_text(f"{fault.grace:.2f} s after it was to stop" if fault.kind == "stop" else what)
        _send(running if fault.everyone else {fault.rank: pids[fault.rank]}, signal.SIGKILL)

    deeds = [(fault.seconds + fault.grace, kill)]
    if fault.kind == "stop":
        deeds.insert(0, (fault.seconds, lambda: os.kill(pids[fault.rank], signal.SIGTERM)))
    return deeds


def _send(running: dict[int, int], number: signal.Signals) -> None:
    for pid in running.values():
        os.kill(pid, number)


def tails(start: Start, length: int = 1500) -> str:
    """The end of each rank's log."""
    parts: list[Any] = []
    for rank in range(start.world.num_ranks):
        log = start.log(rank)
        text = log.read_text(errors="replace")[-length:] if log.exists() else "(none)"
        parts.append(f"--- {log.name}\n{text}")
    return "\n".join(parts)
