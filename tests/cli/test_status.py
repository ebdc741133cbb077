"""`qlora status` against run directories as they are left by runs that go on, end or die."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli.main import main
from qlora.cli.status import committed_checkpoints, last_rows, lock_is_held, read_status

OWNER = """
import fcntl, sys, time
lock = open(sys.argv[1], "r+")
getattr(fcntl, sys.argv[2])(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (2, 10, 30):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        if step != 30:
            (folder / "COMMITTED").touch()
    (tmp_path / "checkpoints/step-00000099.tmp").mkdir()
    (tmp_path / "LOCK").write_text('{"host": "node-1", "pid": 7}')
    rows = [{"step": 9, "loss": 2.0}, {"step": 10, "eval_loss": 1.5}, {"step": 10, "loss": 1.0}, {"step": 11, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 12, "lo')
    write_state(tmp_path, "running")
    return tmp_path


def write_state(run_dir: Path, state: str, **more: object) -> None:
    (run_dir / "status.json").write_text(json.dumps({"state": state, "step": 11, **more}))


def test_the_newest_complete_checkpoint_counts_by_step(run_dir: Path) -> None:
    assert [step for step, _ in committed_checkpoints(run_dir)] == [2, 10]


def test_the_last_rows_skip_a_torn_line(run_dir: Path) -> None:
    assert last_rows(run_dir / "metrics.jsonl") == ({"step": 11, "loss": 0.5}, {"step": 10, "eval_loss": 1.5})
    assert last_rows(run_dir / "none") == (None, None)


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_killed_owner_is_noticed(run_dir: Path, kind: str) -> None:
    command = [sys.executable, "-c", OWNER, str(run_dir / "LOCK"), kind]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        facts = read_status(run_dir)
        assert (facts["state"], facts["owner_alive"], facts["owner"]) == ("running", True, {"host": "node-1", "pid": 7})
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    facts = read_status(run_dir)
    assert (facts["state"], facts["recorded_state"], facts["owner_alive"]) == ("failed", "running", False)
    assert facts["resumable"] is True
    assert "gone" in facts["reason"]
    assert not lock_is_held(run_dir / "LOCK")


def test_how_it_ended(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(run_dir, "stopped", num_steps=20, exit_code=75, reason="stop was asked for", resumable=True)
    assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "stopped",
        "stop was asked for",
        "loss             0.5",
        "1.5 at step 10",
        "11 of 20",
        "step-00000010",
        "75",
        "yes",
    ):
        assert part in shown, shown


def test_json_is_for_programs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "metrics.jsonl").write_text('{"step": 3, "loss": NaN}\n')
    write_state(run_dir, "done", exit_code=0)
    assert main(["status", str(run_dir), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    facts = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (facts["state"], facts["step"], facts["last_row"]) == ("done", 11, {"step": 3, "loss": None})
    assert facts["last_checkpoint"] == {"step": 10, "path": str(run_dir / "checkpoints/step-00000010")}


def test_a_run_that_has_barely_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "LOCK").touch()
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "none yet" in shown
    assert "none" in shown


def test_other_folders_are_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run_dir / "checkpoints/step-00000010")]) == 2
    assert f"next: qlora status {run_dir}" in capsys.readouterr().err
