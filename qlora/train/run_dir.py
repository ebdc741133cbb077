"""The run directory: a lock that dies with its owner, status.json, metrics.jsonl, the resolved config."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from qlora.config.schema import JobConfig
from qlora.errors import CheckpointError, ConfigError
from qlora.files import write_file


class RunDir:
    """The folder of one run, owned by the main rank of the running job.

    Raises:
        CheckpointError: another job holds the folder. ConfigError: it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_steps: int | None = None
        # Outermost last.
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / "LOCK", "a+", encoding="utf-8")  # noqa: SIM115 (held for the life of the job)
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
                next_step="wait for it, stop it, or choose another train.output_dir",
            ) from None
        except OSError as error:
            self._lock.close()
            raise ConfigError(
                f"the file system cannot lock files ({error.strerror})",
                place=f"train.output_dir: {path}",
                next_step="choose a train.output_dir on another file system",
            ) from error
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        try:
            self._lock.truncate(0)
            self._lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": started}) + "\n")
            self._lock.flush()
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(f"the folder cannot be written to ({error.strerror})", place=f"train.output_dir: {self.path}")

    def discard(self) -> bool:
        """Remove what this run made, where that is the folder and its lock alone. Returns whether it was."""
        if not self._made or [file.name for file in self.path.iterdir()] != ["LOCK"]:
            return False
        (self.path / "LOCK").unlink()
        for folder in self._made:
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
        exit_code: int | None = None,
        reason: str | None = None,
        resumable: bool = False,
    ) -> None:
        """How the run stands: running, done, stopped or failed. A full disk warns, and ends no run."""
        self._num_steps = num_steps or self._num_steps
        status = {
            "state": state,
            "step": step,
            "num_steps": self._num_steps,
            "exit_code": exit_code,
            "reason": reason,
            "resumable": resumable,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        try:
            write_file(self.path / "status.json", (json.dumps(status, indent=2) + "\n").encode())
        except OSError as error:
            print(f"warning: status.json cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give the folder up."""
        self._lock.close()


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
                self.accelerator.log({k: v for k, v in row.items() if k not in ("step", "time")}, step=row["step"])
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
