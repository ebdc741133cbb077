"""Runs that are asked to stop, lose their launcher, or find their folder taken, started by the real command lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The training rows, the last of each step, in the order of steps."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def workers_of(pid: int, descendants: Callable[[int], list[int]]) -> list[int]:
    """The ranks below a launcher, by their command line."""
    found = []
    for child in descendants(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"qlora" in words and b"accelerate.commands.launch" not in words:
            found.append(child)
    return sorted(found)


def send(workers: list[int], number: signal.Signals) -> None:
    for worker in workers:
        os.kill(worker, number)


def start(project: Any, run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    overrides = [project.fill(text, 2) for text in ("train.per_device_train_batch_size={rows}", "train.max_steps=40")]
    return project.launch("zero1", 2, "train", str(project.job), f"train.output_dir={run_dir}", *overrides, log=log)


def test_stopped_by_signal_then_orphaned_then_finished(
    project: Any, patiently: Callable[..., Any], descendants: Callable[[int], list[int]], tmp_path: Path
) -> None:
    """One run in three pieces has the losses of the run in one."""
    whole = project.result("zero1.long")
    run_dir, log = tmp_path / "run", tmp_path / "log"

    # A signal to one rank, rank 1 or 0, stops all of them after a save.
    launcher = start(project, run_dir, log)
    patiently(lambda: len(rows_of(run_dir)) >= 2)
    workers = workers_of(launcher.pid, descendants)
    assert len(workers) == 2
    send(workers, signal.SIGSTOP)  # forty steps do not last as long as a second job takes to start
    taken = refused_while_running(project, run_dir)
    send(workers, signal.SIGCONT)
    send(workers[-1:], signal.SIGTERM)
    assert project.wait(launcher, log) == 1  # the launcher's own code; the ranks' is in status.json
    first = json.loads((run_dir / "status.json").read_text())
    assert (first["state"], first["exit_code"], first["resumable"]) == ("stopped", 75, True)
    assert first["step"] == rows_of(run_dir)[-1]["step"] < 40
    assert (run_dir / f"checkpoints/step-{first['step']:08d}/COMMITTED").is_file()
    assert not (run_dir / "adapter").exists()
    assert "error:" not in log.read_text()
    assert taken.returncode == 2
    assert "another job is running in this folder" in taken.stderr
    assert f'"pid": {json.loads((run_dir / "LOCK").read_text())["pid"]}' in taken.stderr
    assert "Traceback" not in taken.stderr

    # A launcher that is gone leaves no ranks behind.
    launcher = start(project, run_dir, log)
    patiently(lambda: rows_of(run_dir)[-1]["step"] >= first["step"] + 2)
    workers = workers_of(launcher.pid, descendants)
    assert len(workers) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    patiently(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), timeout=60)
    second = json.loads((run_dir / "status.json").read_text())
    assert second["state"] == "stopped"
    assert first["step"] < second["step"] < 40

    launcher = start(project, run_dir, log)
    assert project.wait(launcher, log) == 0, log.read_text()[-3000:]
    assert f"after step {second['step']}" in log.read_text()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert [row["loss"] for row in rows_of(run_dir)] == whole.values("loss")
    name = "adapter/adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()


def refused_while_running(project: Any, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """A second job in the folder of one that is running."""
    command = [sys.executable, "-m", "qlora", "train", str(project.job), f"train.output_dir={run_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
