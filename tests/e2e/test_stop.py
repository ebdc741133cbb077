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


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie, which an orphan stays where nobody waits for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def send(workers: list[int], number: signal.Signals) -> None:
    for worker in workers:
        os.kill(worker, number)


def start(
    project: Any, run_dir: Path, log: Path, *more: str, config: str = "zero1", num_steps: int = 40
) -> subprocess.Popen[bytes]:
    overrides = [project.fill("train.per_device_train_batch_size={rows}", 2), f"train.max_steps={num_steps}", *more]
    return project.launch(config, 2, "train", str(project.job), f"train.output_dir={run_dir}", *overrides, log=log)


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
    patiently(lambda: not any(map(is_running, workers)), timeout=60)
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


def test_a_rank_that_dies_takes_the_others_along(
    project: Any, patiently: Callable[..., Any], descendants: Callable[[int], list[int]], tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    launcher = start(project, run_dir, log, "checkpoint.every_steps=2", config="zero2", num_steps=400)
    patiently(lambda: len(rows_of(run_dir)) >= 4)
    workers = workers_of(launcher.pid, descendants)
    send(workers[1:], signal.SIGKILL)
    assert project.wait(launcher, log, timeout=30) == 1
    assert not any(map(is_running, workers))
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("failed", 1, True)
    assert status["num_steps"] == 400
    assert status["step"] >= 2
    assert (run_dir / f"checkpoints/step-{status['step']:08d}/COMMITTED").is_file()
