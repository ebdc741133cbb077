"""What kills a rank from inside: at an operation on a file, in the middle of a write, or at a place of a step.

Audit events come before each operation of the interpreter on names of files, in whatever thread; writes and syncs have
none and are wrapped. Everything here runs in a forked rank, which it may change as it likes.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Fault:
    """One kill.

    Args:
        kind: file (before the `number`-th `operation` on a file under `under` whose name ends so; what is empty counts for
            any), torn (in the middle of the `number`-th write there), step (at the place `number` of its steps), time
            (`seconds` after `since`, from outside), or stop (asked to stop then, and killed `grace` seconds after that).
        everyone: all ranks at once; else `rank` alone.
        no_launcher: no launcher tells the others that one is gone.
    """

    kind: str
    rank: int = 0
    number: int = 0
    operation: str = ""
    under: str = ""
    ending: str = ""
    seconds: float = 0.0
    since: str = ""
    grace: float = 0.0
    everyone: bool = False
    no_launcher: bool = False

    def __str__(self) -> str:
        shown = {key: value for key, value in asdict(self).items() if value or key == "rank"}
        return ", ".join(f"{key}={value}" for key, value in shown.items())


def kill(fault: Fault, note: Path, what: str) -> None:
    """Write down what was being done, and end: this rank, or its whole group."""
    handle = os.open(note, os.O_WRONLY | os.O_CREAT)
    os.write(handle, what.encode())
    if fault.everyone:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class FileWatch:
    """Counts the operations under a run directory, and kills at one of them.

    What is committed, and each operation, is written down at once: nothing here outlives the process.
    """

    def __init__(self, run_dir: Path, fault: Fault | None, note: Path) -> None:
        self.run_dir, self.fault, self.note = f"{run_dir}/", fault, note
        self.count = 0
        self._log = os.open(note.with_suffix(".operations"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._inside = threading.local()
        self._real_write = os.write

    def install(self) -> None:
        """For the rest of this process."""
        sys.addaudithook(self._audit)
        real_sync, real_open, real_write = os.fsync, builtins.open, os.write

        def fsync(handle: int) -> None:
            path = path_of(handle)
            self.before("fsync", path)
            real_sync(handle)
            self.after_sync(path)

        def write(handle: int, content: bytes) -> int:
            self.write("write", path_of(handle), content, lambda part: real_write(handle, part))
            return real_write(handle, content)

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            made = real_open(file, mode, *args, **kwargs)
            ours = not isinstance(file, int) and os.fspath(file).__str__().startswith(self.run_dir)
            return WatchedFile(made, str(file), self) if ours and set(mode) & set("wax+") else made

        os.fsync, os.write = fsync, write  # type: ignore[assignment]
        builtins.open = io.open = opened  # type: ignore[assignment]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or getattr(self._inside, "busy", False):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        folder = arguments[1] if event in ("os.remove", "os.rmdir") else -1
        path = os.path.join(path_of(folder), str(arguments[0])) if folder != -1 else str(arguments[0])
        self.before(event, path)

    def before(self, event: str, path: str) -> None:
        """An operation is about to be done."""
        if not path.startswith(self.run_dir):
            return
        self._inside.busy = True
        what = f"{event} {path[len(self.run_dir) :]}"
        self._real_write(self._log, f"{what}\n".encode())
        if self._is_meant("file", event, path):
            self.count += 1
            if self.fault is not None and self.count == self.fault.number:
                kill(self.fault, self.note, f"before {what}")
        self._inside.busy = False

    def write(self, event: str, path: str, content: Any, half: Any) -> None:
        """A write is about to be done; `half` does a part of it."""
        self.before(event, path)
        if self._is_meant("torn", event, path):
            self.count += 1
            if self.fault is not None and self.count == self.fault.number:
                half(content[: len(content) // 2])
                kill(self.fault, self.note, f"half of {event} {path[len(self.run_dir) :]}")

    def _is_meant(self, kind: str, event: str, path: str) -> bool:
        fault = self.fault
        if fault is None or fault.kind != kind or fault.operation not in ("", event):
            return False
        return path.startswith(f"{self.run_dir}{fault.under}") and path.endswith(fault.ending)

    def after_sync(self, path: str) -> None:
        """COMMITTED that is on the disk is a promise."""
        if path.startswith(self.run_dir) and Path(path).name.startswith("step-") and os.path.exists(f"{path}/COMMITTED"):
            self._real_write(self._log, f"committed {Path(path).name}\n".encode())


class WatchedFile:
    """A file whose writes are counted."""

    def __init__(self, file: Any, path: str, watch: FileWatch) -> None:
        self._file, self._path, self._watch = file, path, watch

    def write(self, content: Any) -> Any:
        def half(part: Any) -> None:
            self._file.write(part)
            self._file.flush()

        self._watch.write("write", self._path, content, half)
        return self._file.write(content)

    def __enter__(self) -> WatchedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def path_of(handle: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return ""


def watch_steps(fault: Fault | None, note: Path, seen: Path, rank: int) -> None:
    """Write down the documents that each step of this rank is trained on, and kill at a place of one."""
    model: Any = import_module("qlora.objective.train_model").TrainModel
    engines = [import_module("qlora.distributed.engine").PlainEngine, import_module("qlora.distributed.zero").ZeroEngine]
    loop: Any = import_module("qlora.train.loop")
    documents: list[list[str]] = []
    places = iter(range(1, 1_000_000))

    def at(place: str) -> None:
        if next(places) == getattr(fault, "number", 0) and fault is not None and fault.kind == "step" and fault.rank == rank:
            kill(fault, note, place)

    def before_and_after(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            at(f"before {name}")
            value = function(*args, **kwargs)
            at(f"after {name}")
            return value

        setattr(owner, name, wrapped)

    forward, run_step = model.forward, loop.run_step

    def recorded(self: Any, batch: Any) -> Any:
        documents.append(digests(batch))
        return forward(self, batch)

    def counted(*args: Any, **kwargs: Any) -> Any:
        documents.clear()
        result = run_step(*args, **kwargs)
        at("before the step is written down")
        line = json.dumps({"step": result.step, "documents": documents}) + "\n"
        os.write(handle, line.encode())
        at("after the step is written down")
        return result

    handle = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    model.forward, loop.run_step = recorded, counted
    before_and_after(model, "forward")
    for engine in engines:
        before_and_after(engine, "backward")
        before_and_after(engine, "step")


def digests(batch: Any) -> list[str]:
    """The documents of a batch, by what they say. None of an empty batch."""
    import hashlib

    if batch.is_empty:
        return []
    parts = batch.input_ids_BT[0].split(batch.document_lengths)
    return [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in parts]
