"""Jobs that meet a fault: `main(argv)` in a child of the test process, which has everything imported already.

A child may have mounts of its own, so that its disk can be small, fill up, or become read-only, and nothing of it is
left when it ends. It is forked before anything of a job is started, so each job is what `python -m qlora` would be.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.e2e.places import free_port

NO_MOUNTS = 98
CRASHED = 97
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER of sched.h
_PRIVATE, _READ_ONLY, _REMOUNT, _BIND = (1 << 18) | 16384, 1, 32, 4096  # MS_* of sys/mount.h
_LIBC = ctypes.CDLL(None, use_errno=True)

STEPS = 7
EVERY_TWO = ("checkpoint.every_steps=2", "checkpoint.keep_last=10")


@dataclass(frozen=True)
class Ended:
    """How a job ended, and what it said on both streams."""

    run_dir: Path
    code: int
    log: str

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    @property
    def losses(self) -> list[float]:
        """Of each step, the last row that counts."""
        rows = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for _, row in sorted({row["step"]: row for row in rows if "loss" in row}.items())]

    @property
    def adapter(self) -> bytes:
        return (self.run_dir / "adapter/adapter_model.safetensors").read_bytes()

    def is_one_error(self, *parts: str) -> None:
        """One error, without a traceback, that says these things."""
        assert self.code == 2, self.log
        assert self.log.count("error:") == 1, self.log
        assert "Traceback" not in self.log, self.log
        for part in parts:
            assert part in self.log, self.log


def in_child(work: Callable[[], int | None], log: Path) -> int:
    """Do something in a forked process whose streams go to a file. Returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = CRASHED
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        # What other tests of this process have left: a process group of one.
        import_module("accelerate.state").AcceleratorState._reset_state(True)
        code = work() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def own_mounts() -> None:
    """Give this process mounts of its own. Raises OSError where that is not allowed."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS | (0 if uid == 0 else _NEW_USER))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _call("mount", b"none", b"/", None, _PRIVATE, None)


def small_disk(folder: Path, num_bytes: int) -> None:
    """Mount an empty file system of this size, in memory."""
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", 0, f"size={num_bytes}".encode())


def make_read_only(folder: Path, *, is_mounted: bool = False) -> None:
    """Let nothing be written below a folder any more, whoever tries."""
    if not is_mounted:
        _call("mount", os.fsencode(folder), os.fsencode(folder), None, _BIND, None)
    _call("mount", b"none", os.fsencode(folder), None, _REMOUNT | _READ_ONLY | (0 if is_mounted else _BIND), None)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_LIBC, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def fill_up(folder: Path, *, but: int = 0) -> None:
    """Leave nothing free on a file system, or so many bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
        file.truncate(file.tell() - but)


class Jobs:
    """Starts jobs on one small base and its data."""

    def __init__(self, project: Any, folder: Path) -> None:
        self.project, self.folder, self.number = project, folder, 0

    def argv(self, run_dir: Path, *overrides: str) -> list[str]:
        return ["train", str(self.project.job), f"train.output_dir={run_dir}", *overrides]

    def train(
        self, run_dir: Path, *overrides: str, fault: Callable[[], object] = lambda: None, mounts: bool = False,
        after: Callable[[], object] = lambda: None,
    ) -> Ended:  # fmt: skip
        """One job.

        Args:
            fault: called in the child before the job, which may put anything in its way.
            mounts: give the child mounts of its own first.
            after: called in the child when the job has ended.
        """

        def work() -> int:
            if mounts:
                own_mounts()
            fault()
            from qlora.cli.main import main

            code = main(self.argv(run_dir, *overrides))
            after()
            return code

        self.number += 1
        log = self.folder / f"log{self.number}"
        return Ended(run_dir, in_child(work, log), log.read_text(errors="replace"))


def two_ranks(work: Callable[[int], int], log: Path) -> list[Ended]:
    """Do something on two ranks of one data-parallel job over gloo, forked with the environment that a launcher gives."""
    port = free_port()

    def as_rank(rank: int) -> Callable[[], int]:
        def do() -> int:
            both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {**both, **own}
            return work(rank)

        return do

    files = [log.with_suffix(f".{rank}") for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda rank: in_child(as_rank(rank), files[rank]), range(2)))
    return [Ended(log.parent, code, file.read_text(errors="replace")) for code, file in zip(codes, files, strict=True)]


def wait_for(file: Path, seconds: float = 60.0) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"waited in vain for {file}"
        time.sleep(0.02)


def wait_for_checkpoint(run_dir: Path, step: int) -> None:
    """Wait until a checkpoint is committed, which is written while training goes on."""
    wait_for(run_dir / f"checkpoints/step-{step:08d}/COMMITTED")


def at_step(number: int, do: Callable[[], object]) -> None:
    """Do something just before an optimizer step of this process, counted from 1."""
    from qlora.train import loop

    run_step = loop.run_step

    def do_and_step(engine: Any, runtime: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        if batches.step + 1 == number:
            do()
        return run_step(engine, runtime, batches, *args, **kwargs)

    loop.run_step = do_and_step
