"""The run directory: a lock that dies with its owner, status.json, metrics.jsonl, the resolved config, the stop file."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from qlora.checkpoint.state import committed, step_of
from qlora.config.schema import JobConfig
from qlora.errors import EXIT_BUG, CheckpointError, ConfigError
from qlora.files import sweep_unfinished, write_file
from qlora.secrets import redact

STOP_FILE = "STOP"


class RunDir:
    """The folder of one run, owned by the main rank of the running job.

    Raises:
        CheckpointError: another job holds the folder. ConfigError: it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_steps: int | None = None
        self._num_skipped = 0
        self._has_ended = False
        self._writing = threading.RLock()
        # Outermost last.
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / "LOCK", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (held for the life of the job)
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise CheckpointError(
                "another job is running in this folder",
                place=str(path),
                found=owner,
                next_step=f"wait for it, stop it, or choose another train.output_dir{_how_to_take(owner, path / 'LOCK')}",
            ) from None
        except OSError as error:
            self._lock.close()
            raise ConfigError(
                f"the file system cannot lock files ({error.strerror})",
                place=f"train.output_dir: {path}",
                next_step="choose a train.output_dir on another file system",
            ) from error
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": started}
        try:
            self._lock.truncate(0)
            self._lock.write(json.dumps(self.owner) + "\n")
            self._lock.flush()
            # Meant for a job that has ended. One that is written from here on says whom it is meant for.
            (path / STOP_FILE).unlink(missing_ok=True)
            for folder in (path, path / "adapter"):
                sweep_unfinished(folder)
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(f"the folder cannot be written to ({error.strerror})", place=f"train.output_dir: {self.path}")

    def discard(self) -> bool:
        """Remove what this run made, where that is the folder and its lock alone. Returns whether it was."""
        if not self._made or not {file.name for file in self.path.iterdir()} <= {"LOCK", STOP_FILE}:
            return False
        for file in self.path.iterdir():
            file.unlink()
        made, self._made = self._made, []
        for folder in made:
            if any(folder.iterdir()):  # somebody else's by now
                break
            folder.rmdir()
        return True

    def write_config(self, text: str) -> None:
        """The resolved job. Raises ConfigError where it cannot be written."""
        try:
            write_file(self.path / "config.yaml", text.encode())
        except OSError as error:
            raise self._not_writable(error) from error

    def write_status(
        self,
        state: str,
        step: int,
        *,
        num_steps: int | None = None,
        num_skipped: int | None = None,
        exit_code: int | None = None,
        reason: str | None = None,
        resumable: bool = False,
    ) -> None:
        """How the run stands: running, done, stopped or failed. A full disk warns, and ends no run."""
        self._num_steps = num_steps or self._num_steps
        self._num_skipped = self._num_skipped if num_skipped is None else num_skipped
        status = {
            "state": state,
            "step": step,
            "num_steps": self._num_steps,
            "num_skipped_steps": self._num_skipped,
            "exit_code": exit_code,
            "reason": redact(reason) if reason else None,
            "resumable": resumable,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        try:
            with self._writing:
                write_file(self.path / "status.json", (json.dumps(status, indent=2) + "\n").encode())
                self._has_ended = state != "running"
        except OSError as error:
            print(f"warning: status.json cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def write_end_at_once(self, reason: str, code: int) -> None:
        """Say in status.json that the run ends this moment, unless its end is there already. For any thread."""
        with self._writing:
            if self._has_ended:
                return
            done = committed(self.path)
            step = step_of(done[-1]) if done else 0
            said = f"{reason}: ended at once, without saving"
            state = "failed" if code == EXIT_BUG else "stopped"
            self.write_status(state, step, exit_code=code, reason=said, resumable=bool(done))

    def stop_asked(self) -> str | None:
        """Why the stop file asks this run to stop; None where there is none. A file for another run is removed.

        An empty file, made by hand, is for whoever runs here.
        """
        try:
            # Opening a folder makes a network file system ask its server; looking up a name that was not there does not.
            if STOP_FILE not in os.listdir(self.path):
                return None
            content = (self.path / STOP_FILE).read_text(encoding="utf-8", errors="replace")
            if content.strip() and _owner_in(content) not in (None, self.owner):
                (self.path / STOP_FILE).unlink(missing_ok=True)
                return None
        except OSError:
            return None
        return f"the file {STOP_FILE} in the run directory"

    def close(self) -> None:
        """Give the folder up."""
        with suppress(OSError):
            (self.path / STOP_FILE).unlink(missing_ok=True)
        self._lock.close()


def _owner_in(content: str) -> Any:
    """Whom a stop file is meant for; None where it does not say."""
    try:
        return json.loads(content).get("owner")
    except (ValueError, AttributeError, RecursionError):
        return None


def _how_to_take(owner: str, lock: Path) -> str:
    """What may be done about an owner on another host, whose death a file server may learn of late or never."""
    try:
        host = json.loads(owner).get("host")
    except (ValueError, AttributeError, RecursionError):
        return ""
    if host in (None, socket.gethostname()):
        return ""
    return f"; if {host} is gone for good and its file server holds the lock for it, take the folder over: rm {lock}"


def start_trackers(accelerator: Any, config: JobConfig) -> None:
    """Start the job's trackers. One that fails warns, and the run goes on without any. Main rank only."""
    try:
        accelerator.init_trackers("qlora", config=config.model_dump(mode="json"))
    except Exception as error:  # a tracker's own errors have no common type
        accelerator.trackers = []
        print(f"warning: a tracker cannot start ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


class MetricsWriter:
    """Appends rows to metrics.jsonl, each flushed, and hands them to the trackers. Never ends a run by failing."""

    def __init__(self, path: Path, accelerator: Any = None) -> None:
        self.path, self.accelerator, self.warned = path, accelerator, False

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. A full disk or a tracker that is down warns once."""
        try:
            with open(self.path, "a+b") as file:
                line = json.dumps(row).encode() + b"\n"
                # What a full disk or a killed process left of a row must not swallow this one.
                file.write(b"\n" + line if _is_torn(file) else line)
        except OSError as error:
            self._warn(f"{self.path} cannot be written ({error.strerror}); training goes on without it")
        if self.accelerator is not None and self.accelerator.trackers:
            try:
                values = {k: v for k, v in row.items() if k not in ("step", "time") and v is not None}
                self.accelerator.log(values, step=row["step"])
            except Exception as error:  # a tracker's own errors have no common type
                self._warn(f"a tracker failed ({type(error).__name__}: {error}); training goes on")

    def _warn(self, text: str) -> None:
        if not self.warned:
            print(f"warning: {text}", file=sys.stderr, flush=True)
            self.warned = True


def _is_torn(file: BinaryIO) -> bool:
    """Whether a file's last line has no end."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
