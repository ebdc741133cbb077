"""Run directories that two jobs want, whose owner was killed, that came from elsewhere, or were copied and moved."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora.checkpoint.resume import find_checkpoint
from qlora.cli.main import main
from tests.faults.children import EVERY_TWO, Ended, Jobs, at_step, in_child, wait_for, wait_for_checkpoint


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything but what a start that is refused may write: nothing."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_two_jobs_in_a_folder_the_second_is_refused_and_a_killed_one_does_not_block(
    jobs: Jobs, whole: Ended, tmp_path: Path
) -> None:
    """The first is held in its fifth step while the second tries, goes on unharmed, and is killed in its seventh."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    reached, go_on, again, never = (tmp_path / name for name in ("reached", "go_on", "again", "never"))

    def meet(step: int, here: Path, then: Path) -> None:
        at_step(step, lambda: (here.touch(), wait_for(then)))

    def first() -> int:
        meet(5, reached, go_on)
        meet(7, again, never)
        return main(jobs.argv(run_dir, *EVERY_TWO))

    child = os.fork()
    if child == 0:
        os._exit(in_child(first, log))
    try:
        wait_for(reached)
        wait_for_checkpoint(run_dir, 4)
        before = files_of(run_dir)
        owner = json.loads((run_dir / "LOCK").read_text())
        second = jobs.train(run_dir, *EVERY_TWO)
        second.is_one_error("another job is running in this folder", f'"pid": {owner["pid"]}', "wait for it, stop it")
        forced = jobs.train(run_dir, *EVERY_TWO, "--force")
        forced.is_one_error("another job is running in this folder")
        assert files_of(run_dir) == before
        go_on.touch()
        wait_for(again)
        wait_for_checkpoint(run_dir, 6)
        os.kill(owner["pid"], signal.SIGKILL)
    finally:
        for file in (go_on, never):
            file.touch()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 256 - signal.SIGKILL, log.read_text()
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    assert found.trainer.step == 6
    third = jobs.train(run_dir, *EVERY_TWO)
    assert third.code == 0, third.log
    assert "after step 6" in third.log
    assert third.losses == whole.losses
    assert third.adapter == whole.adapter


FORGED: dict[str, bytes] = {
    "of another host": b'{"host": "gone.example", "pid": 1, "start": "2020-01-01T00:00:00+0000"}\n',
    "of a pid that is somebody's here": b'{"host": "here", "pid": 1, "start": "2020-01-01T00:00:00+0000"}\n',
    "of no form": b"\xff\x00 not JSON",
    "of nothing": b"",
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
def test_what_a_lock_says_blocks_nobody(jobs: Jobs, whole: Ended, tmp_path: Path, content: bytes) -> None:
    """The operating system's lock counts, which dies with its owner; the content is for people."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir)
    (run_dir / "LOCK").write_bytes(content)
    ended = jobs.train(run_dir, *EVERY_TWO)
    assert ended.code == 0, ended.log
    assert json.loads((run_dir / "LOCK").read_text())["pid"] == ended.status["pid"]


def test_a_lock_that_another_host_still_holds_says_how_to_take_it(jobs: Jobs, whole: Ended, tmp_path: Path) -> None:
    """A file server may hold a lock for a host that has died. Removing the file is what takes the folder over."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir)
    with (run_dir / "LOCK").open("wb") as lock:
        lock.write(FORGED["of another host"])
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = jobs.train(run_dir, *EVERY_TWO)
        refused.is_one_error("another job is running", "gone.example", f"rm {run_dir / 'LOCK'}")
        (run_dir / "LOCK").unlink()
        taken = jobs.train(run_dir, *EVERY_TWO)
    assert taken.code == 0, taken.log


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_folder_that_was_copied_or_moved_goes_on(jobs: Jobs, whole: Ended, tmp_path: Path, how: str) -> None:
    source, target = tmp_path / "a/run", tmp_path / "elsewhere/b"
    shutil.copytree(whole.run_dir, source, ignore=shutil.ignore_patterns("adapter", "step-00000006", "step-00000007"))
    if how == "copied":
        shutil.copytree(source, target)
        before = files_of(source)
    else:
        target.parent.mkdir()
        source.rename(target)
    ended = jobs.train(target, *EVERY_TWO)
    assert ended.code == 0, ended.log
    assert "after step 4" in ended.log
    assert ended.losses == whole.losses
    assert ended.adapter == whole.adapter
    assert not source.exists() if how == "moved" else files_of(source) == before


def test_a_checkpoint_names_no_file_outside_itself(whole: Ended) -> None:
    """But for the base and the data, which are the job's, and where the run was, which may change."""
    for folder in (whole.run_dir / "checkpoints").iterdir():
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        assert manifest["identity"]["config"]["train"].pop("output_dir") == str(whole.run_dir)
        assert str(whole.run_dir) not in json.dumps(manifest)
        for path in folder.iterdir():
            if path.name != "manifest.json":
                assert str(whole.run_dir).encode() not in path.read_bytes(), path


def test_clocks_do_not_decide_which_checkpoint_is_the_newest(jobs: Jobs, whole: Ended, tmp_path: Path) -> None:
    """The oldest is from the future, the newest from 1970."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir, ignore=shutil.ignore_patterns("adapter", "step-00000007"))
    for number, folder in enumerate(sorted((run_dir / "checkpoints").iterdir(), reverse=True)):
        for path in [*folder.iterdir(), folder]:
            os.utime(path, (4_000_000_000 * number, 4_000_000_000 * number))
    ended = jobs.train(run_dir, *EVERY_TWO)
    assert ended.code == 0, ended.log
    assert "after step 6" in ended.log
    assert ended.adapter == whole.adapter
