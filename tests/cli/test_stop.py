"""`qlora stop` against run directories that are held, left and missing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.cli.main import main
from qlora.cli.status import read_status

# A job as far as `qlora stop` sees it: it ends half a second after it was asked.
JOB = """
import sys, time; from pathlib import Path; from qlora.train.run_dir import RunDir
run_dir = RunDir(Path(sys.argv[1])); run_dir.write_status("running", 3, num_steps=9); print(1, flush=True)
while not (reason := run_dir.stop_asked()): time.sleep(0.05)
time.sleep(0.5)
run_dir.write_status("stopped", 4, exit_code=75, reason=reason, resumable=True); run_dir.close()
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    process = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    yield tmp_path / "run"
    process.kill()
    process.communicate()


def test_a_running_job_is_asked_and_waited_for(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = json.loads((job / "LOCK").read_text())
    assert main(["stop", str(job), "--wait", "--timeout", "30"]) == 0
    shown = capsys.readouterr().out
    assert f"asked {job} (host {owner['host']}, pid {owner['pid']}) to save and stop" in shown
    assert "the file STOP" in shown
    assert (read_status(job)["state"], read_status(job)["step"]) == ("stopped", 4)
    assert not (job / "STOP").exists()


def test_without_waiting_it_comes_back_at_once(job: Path) -> None:
    assert main(["stop", str(job)]) == 0
    assert read_status(job)["owner_alive"]
    assert json.loads((job / "STOP").read_text())["owner"] == json.loads((job / "LOCK").read_text())


def test_waiting_is_bounded(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["stop", str(job), "--wait", "--timeout", "0.1"]) == 2
    assert time.monotonic() - began < 5
    assert "still running after 0.1 s" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["done", "failed", "running"])
def test_a_run_that_is_over_is_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    (tmp_path / "LOCK").write_text('{"host": "node-1", "pid": 7}')
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "step": 11}))
    assert main(["stop", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "no job is running in this folder" in err
    assert f"{'failed' if state == 'running' else state}, step 11" in err
    assert not (tmp_path / "STOP").exists()
    assert main(["stop", str(tmp_path), "--force"]) == 0
    assert json.loads((tmp_path / "STOP").read_text())["owner"] is None


def test_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", str(tmp_path / "nothing")]) == 2
    assert "no such run directory" in capsys.readouterr().err
    assert main(["stop", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_an_earlier_start_does_not_speak_for_the_one_that_runs(job: Path) -> None:
    status = json.loads((job / "status.json").read_text())
    (job / "status.json").write_text(json.dumps(status | {"state": "failed", "pid": 1, "reason": "of old"}))
    facts = read_status(job)
    assert (facts["state"], facts["reason"]) == ("running", None)
