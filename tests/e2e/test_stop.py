"""Runs that are asked to stop, lose their launcher, find their folder taken, or leave steps out that are not finite.

Most are started by the real command lines; where something has to happen at one place, by `jobs_with_stops.py`.
"""

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

from qlora.cli.main import main
from qlora.cli.status import lock_is_held
from tests.e2e.places import End, run_places

pytestmark = pytest.mark.e2e
SCRIPT = "jobs_with_stops.py"


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
    project: Any, run_dir: Path, log: Path, *more: str, config: str = "zero1", num_steps: int = 160
) -> subprocess.Popen[bytes]:
    overrides = [project.fill("train.per_device_train_batch_size={rows}", 2), f"train.max_steps={num_steps}", *more]
    return project.launch(config, 2, "train", str(project.job), f"train.output_dir={run_dir}", *overrides, log=log)


def test_stopped_by_signal_then_by_file_then_orphaned_then_finished(
    project: Any, patiently: Callable[..., Any], descendants: Callable[[int], list[int]], tmp_path: Path
) -> None:
    """One run in four pieces has the losses of the run in one."""
    whole = project.result("zero1.long")
    run_dir, log = tmp_path / "run", tmp_path / "log"

    # A signal to one rank, rank 1 or 0, stops all of them after a save.
    launcher = start(project, run_dir, log)
    patiently(lambda: len(rows_of(run_dir)) >= 2)
    workers = workers_of(launcher.pid, descendants)
    assert len(workers) == 2
    send(workers, signal.SIGSTOP)  # the steps do not last as long as a second job takes to start
    taken = refused_while_running(project, run_dir)
    send(workers, signal.SIGCONT)
    send(workers[-1:], signal.SIGTERM)
    assert project.wait(launcher, log) == 1  # the launcher's own code; the ranks' is in status.json
    first = json.loads((run_dir / "status.json").read_text())
    assert (first["state"], first["exit_code"], first["resumable"]) == ("stopped", 75, True)
    assert first["step"] == rows_of(run_dir)[-1]["step"] < 160
    assert (run_dir / f"checkpoints/step-{first['step']:08d}/COMMITTED").is_file()
    assert not (run_dir / "adapter").exists()
    assert "error:" not in log.read_text()
    assert taken.returncode == 2
    assert "another job is running in this folder" in taken.stderr
    assert f'"pid": {json.loads((run_dir / "LOCK").read_text())["pid"]}' in taken.stderr
    assert "Traceback" not in taken.stderr

    # So does a file, wherever it comes from.
    launcher = start(project, run_dir, log)
    patiently(lambda: rows_of(run_dir)[-1]["step"] >= first["step"] + 2)
    assert main(["stop", str(run_dir), "--wait", "--timeout", "60"]) == 0
    assert project.wait(launcher, log) == 1
    asked = json.loads((run_dir / "status.json").read_text())
    assert (asked["state"], asked["exit_code"], asked["resumable"]) == ("stopped", 75, True)
    assert "the file STOP" in asked["reason"]
    assert first["step"] < asked["step"] < 160
    assert not (run_dir / "STOP").exists()

    # A launcher that is gone leaves no ranks behind.
    launcher = start(project, run_dir, log)
    patiently(lambda: rows_of(run_dir)[-1]["step"] >= asked["step"] + 2)
    workers = workers_of(launcher.pid, descendants)
    assert len(workers) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    patiently(lambda: not any(map(is_running, workers)), timeout=60)
    second = json.loads((run_dir / "status.json").read_text())
    assert (second["state"], second["reason"]) == ("stopped", "the launcher is gone")
    assert asked["step"] < second["step"] < 160

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


PLACES = {
    "tokenizing": ["data.cache_dir={folder}/fresh"],
    "loading": [],
    "loading, by the file": [],
    "settling": [],
    "evaluating": ["data.eval=[{eval}]", "eval.every_steps=2", "eval.per_device_eval_batch_size=1"],
    "saving": ["checkpoint.every_steps=2"],
    "twice": ["data.eval=[{eval}]", "eval.every_steps=2", "eval.per_device_eval_batch_size=1", "checkpoint.every_steps=2"],
}


@pytest.fixture(scope="module")
def ends(project: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    return run_places(project, tmp_path_factory.mktemp("stops"), "zero3", SCRIPT, PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_a_stop_is_honoured_wherever_the_run_is(ends: dict[str, End], place: str) -> None:
    end = ends[place]
    if place == "twice":
        assert end.codes[0] == 128 + signal.SIGTERM, end.logs
        assert end.codes[1] != 0
    else:
        assert end.codes == [75, 75], end.logs
        assert "error" not in end.logs[0].lower() + end.logs[1].lower()
    assert end.seconds < 25
    before = place.startswith(("tokenizing", "loading", "settling"))
    step = {"evaluating": 2, "saving": 3, "twice": 2}.get(place, 0)
    status = end.status
    assert (status["state"], status["step"], status["resumable"]) == ("stopped", step, not before)
    assert status["exit_code"] == (75 if place != "twice" else 143)
    assert ("before the first step" in status["reason"]) == before
    reasons = {"loading, by the file": "STOP", "tokenizing": "SIGTERM", "saving": "SIGTERM", "twice": "a second signal"}
    assert reasons.get(place, "") in status["reason"]
    assert end.checkpoints == {0: [], 2: ["step-00000002"], 3: ["step-00000002", "step-00000003"]}[step]
    # Nothing half written, and the folder is free.
    left = {file.name for file in end.run_dir.rglob("*")}
    assert not any(name.endswith((".tmp", ".trash")) or name in ("STOP", "adapter") for name in left)
    assert not lock_is_held(end.run_dir / "LOCK")
    if place == "evaluating":
        assert not any("eval_loss" in row for row in rows_of(end.run_dir))
        assert "evaluation left" in end.logs[0]
    if place == "tokenizing":
        assert {file.suffix for file in (end.run_dir.parent / "fresh").iterdir()} <= {".lock"}


@pytest.mark.long
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_steps_that_are_not_finite_change_nothing_and_end_the_run_when_they_go_on(
    project: Any, tmp_path: Path, config: str
) -> None:
    """Rank 1 spoils steps 2, 4, 6, 8 and 9, in one way or another."""
    job = ["checkpoint.every_steps=1", "checkpoint.keep_last=99", "train.gradient_accumulation_steps=2"]
    more = [*job, "train.max_steps=12", "train.max_nonfinite_steps=2"]
    six = [*job, "train.max_steps=6"]
    places = {"once": six, "resumed": six, "not finite": more}
    ends = run_places(project, tmp_path, config, SCRIPT, places)
    end = ends["not finite"]
    assert end.codes == [2, 2], end.logs
    status = end.status
    assert (status["state"], status["exit_code"], status["resumable"], status["step"]) == ("failed", 2, True, 8)
    assert status["num_skipped_steps"] == 5
    assert "at step 9, as at every step since 8" in status["reason"]
    assert "ranks 1" in status["reason"]
    assert end.checkpoints == [f"step-{step:08d}" for step in range(1, 9)]

    def saved(step: int) -> list[bytes]:
        folder = end.run_dir / f"checkpoints/step-{step:08d}"
        return [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors")]

    for step in range(2, 9):
        same = [a == b for a, b in zip(saved(step), saved(step - 1), strict=True)]
        assert same == [step % 2 == 0] * 2, step
    rows = {row["step"]: row for row in rows_of(end.run_dir)}
    assert [rows[step]["num_skipped_steps"] for step in range(1, 10)] == [0, 1, 1, 2, 2, 3, 3, 4, 5]
    assert [step for step, row in rows.items() if row["loss"] is None] == [2, 4, 8, 9]
    assert [step for step, row in rows.items() if row["grad_norm"] is None] == [2, 4, 6, 8, 9]

    aside = {int(path.stem.removeprefix("step-")): path for path in (end.run_dir / "nonfinite").iterdir()}
    lines = {step: [json.loads(line) for line in path.read_text().splitlines()] for step, path in aside.items()}
    assert sorted(lines) == [2, 4, 6, 8, 9]
    assert {(row["rank"], row["micro_step"]) for step in (2, 4, 8, 9) for row in lines[step]} == {(1, 0)}
    assert {(row["rank"], row["micro_step"]) for row in lines[6]} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    train = project.train.read_text()
    for row in lines[2]:
        assert json.loads(train.splitlines()[row["row"]])["messages"][1]["content"] in row["text"]

    # A run that goes on from after a skipped step is the run that was never cut: its optimizer counts updates, not steps.
    once, resumed = ends["once"], ends["resumed"]
    assert once.codes == resumed.codes == [0, 0], once.logs + resumed.logs
    assert [row["num_skipped_steps"] for row in rows_of(once.run_dir)] == [0, 1, 1, 1, 1, 1]
    assert "after step 3" in resumed.logs[0]
    name = "adapter/adapter_model.safetensors"
    assert (once.run_dir / name).read_bytes() == (resumed.run_dir / name).read_bytes()
