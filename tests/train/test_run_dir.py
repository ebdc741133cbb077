"""The lock, status.json and metrics.jsonl, with owners that die and disks that are full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import CheckpointError, ConfigError
from qlora.train import run_dir as module
from qlora.train.run_dir import STOP_FILE, MetricsWriter, RunDir

HOLD = """
import sys; from pathlib import Path; from qlora.train.run_dir import RunDir
run_dir = RunDir(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_with_its_owner(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another job is running") as raised:
        RunDir(tmp_path / "run")
    assert f'"pid": {owner.pid}' in str(raised.value)
    assert json.loads((tmp_path / "run/LOCK").read_text())["pid"] == owner.pid  # left as it was


def test_a_dead_owner_does_not_block(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    owner.kill()
    owner.wait()
    assert str(owner.pid) in (tmp_path / "run/LOCK").read_text()
    held = RunDir(tmp_path / "run")
    facts = json.loads((tmp_path / "run/LOCK").read_text())
    assert facts["pid"] == os.getpid()
    assert set(facts) == {"host", "pid", "start"}
    held.close()
    RunDir(tmp_path / "run").close()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_an_error_of_the_job(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train\.output_dir"):
        RunDir(tmp_path / place)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match="cannot lock files"):
        RunDir(tmp_path / "run")


def test_status_is_replaced_as_a_whole_and_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = RunDir(tmp_path)
    held.write_status("running", 3, num_steps=9)
    first = json.loads((tmp_path / "status.json").read_text())
    assert (first["state"], first["step"], first["num_steps"], first["resumable"]) == ("running", 3, 9, False)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_file", full)
    held.write_status("running", 4)
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads((tmp_path / "status.json").read_text()) == first
    with pytest.raises(ConfigError, match="No space left"):
        held.write_config("x: 1")
    held.close()


def test_a_stop_file_from_before_the_start_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).write_text("")
    held = RunDir(tmp_path)
    assert held.stop_asked() is None
    assert not (tmp_path / STOP_FILE).exists()
    held.close()


def test_a_stop_file_is_honoured_and_removed(tmp_path: Path) -> None:
    for content in ("", "{}", "please", json.dumps({"owner": None, "time": 1.0}), "own"):
        held = RunDir(tmp_path)
        (tmp_path / STOP_FILE).write_text(json.dumps({"owner": held.owner}) if content == "own" else content)
        assert "STOP" in (held.stop_asked() or "")
        held.close()
        assert not (tmp_path / STOP_FILE).exists()


def test_a_stop_file_for_the_run_before_is_removed(tmp_path: Path) -> None:
    """Written by one who looked at the lock a moment before the next run took it."""
    before = RunDir(tmp_path)
    before.close()
    held = RunDir(tmp_path)
    (tmp_path / STOP_FILE).write_text(json.dumps({"owner": before.owner | {"pid": 1}}))
    assert held.stop_asked() is None
    assert not (tmp_path / STOP_FILE).exists()
    held.close()


def test_an_end_at_once_is_written_unless_the_end_is_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000004/COMMITTED").touch()
    held = RunDir(tmp_path)
    held.write_status("running", 6, num_steps=9)
    held.write_end_at_once("a second signal (SIGTERM)", 143)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"], status["resumable"]) == ("stopped", 4, 143, True)
    assert "without saving" in status["reason"]
    held.write_end_at_once("again", 1)
    assert json.loads((tmp_path / "status.json").read_text()) == status
    held.close()


def test_a_refused_start_removes_what_it_made_and_no_more(tmp_path: Path) -> None:
    held = RunDir(tmp_path / "a/b")
    (tmp_path / "a/b" / STOP_FILE).touch()
    assert held.discard()
    assert not held.discard()
    assert list(tmp_path.iterdir()) == []
    held.close()
    (tmp_path / "c").mkdir()
    there = RunDir(tmp_path / "c")
    assert not there.discard()
    there.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def test_rows_are_appended_and_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        MetricsWriter(path).write({"step": step})
        assert rows_of(path)[-1] == {"step": step}
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_torn_row_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsWriter(path).write({"step": 3})
    assert rows_of(path) == [{"step": 1}, {"step": 3}]


def test_a_full_disk_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    writer = MetricsWriter(path)
    for step in range(3):
        writer.write({"step": step})
    err = capsys.readouterr().err
    assert err.count("warning:") == 1
    assert "No space left on device" in err
    path.unlink()
    writer.write({"step": 4})
    assert rows_of(path) == [{"step": 4}]


class Trackers:
    trackers = ("some",)

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], int]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.seen.append((values, step))
        raise ConnectionError("it is down")


def test_trackers_get_the_row_and_may_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers = Trackers()
    writer = MetricsWriter(tmp_path / "metrics.jsonl", trackers)
    for step in (1, 2):
        writer.write({"step": step, "loss": 0.5, "time": 9.0})
    assert trackers.seen == [({"loss": 0.5}, 1), ({"loss": 0.5}, 2)]
    assert capsys.readouterr().err.count("a tracker failed (ConnectionError: it is down)") == 1
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 2
