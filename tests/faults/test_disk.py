"""Disks that are full, fill up, or may not be written to: known before the run where it can be, and never a loss.

The disks are real ones, small, and of the job's process alone.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from qlora.checkpoint.resume import find_checkpoint
from tests.faults.children import (
    EVERY_TWO,
    STEPS,
    Ended,
    Jobs,
    at_step,
    fill_up,
    make_read_only,
    small_disk,
    wait_for_checkpoint,
)

MIB = 1 << 20


def keep(disk: Path, target: Path) -> None:
    """What is on a disk that goes away with its process."""
    shutil.copytree(disk, target, ignore=shutil.ignore_patterns("ballast"))


def goes_on_as(whole: Ended, jobs: Jobs, run_dir: Path, step: int) -> None:
    """The run goes on after that step, and is then the run that met no fault."""
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    assert found.trainer.step == step
    resumed = jobs.train(run_dir, *EVERY_TWO)
    assert resumed.code == 0, resumed.log
    assert f"after step {step}" in resumed.log
    assert resumed.adapter == whole.adapter
    assert resumed.losses == whole.losses


@pytest.mark.usefixtures("mounts")
def test_a_disk_that_fills_up_ends_the_run_at_its_next_save(jobs: Jobs, whole: Ended, tmp_path: Path) -> None:
    """A part of the checkpoint can still be written, and is taken away again."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()

    def fault() -> None:
        small_disk(disk, 8 * MIB)
        at_step(4, lambda: (wait_for_checkpoint(disk, 2), fill_up(disk, but=40_000)))

    ended = jobs.train(disk, *EVERY_TWO, fault=fault, mounts=True, after=lambda: keep(disk, kept))
    ended.is_one_error("the checkpoint cannot be written (No space left on device)", "step-00000004", "bytes to write")
    assert "step 4/7" in ended.log
    assert [path.name for path in sorted((kept / "checkpoints").iterdir())] == ["step-00000002"]
    goes_on_as(whole, jobs, kept, 2)


@pytest.mark.usefixtures("mounts")
def test_a_disk_that_becomes_read_only_ends_the_run_at_its_next_save(jobs: Jobs, whole: Ended, tmp_path: Path) -> None:
    """As ext4 makes itself after an error of the device."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()

    def fault() -> None:
        small_disk(disk, 8 * MIB)
        # A file that is open for writing, as LOCK is, would keep a remount from working; a bind mount does not ask.
        at_step(4, lambda: (wait_for_checkpoint(disk, 2), make_read_only(disk)))

    ended = jobs.train(disk, *EVERY_TWO, fault=fault, mounts=True, after=lambda: keep(disk, kept))
    ended.is_one_error("the checkpoint cannot be written (Read-only file system)", "step-00000004")
    assert "status.json cannot be written" in ended.log
    goes_on_as(whole, jobs, kept, 2)


@pytest.mark.usefixtures("mounts")
def test_a_folder_that_is_read_only_is_known_before_the_base_is_loaded(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ended = jobs.train(tmp_path / "run/new", fault=lambda: make_read_only(tmp_path / "run"), mounts=True)
    ended.is_one_error("train.output_dir", str(tmp_path / "run"))
    assert "base      " not in ended.log
    assert [*(tmp_path / "run").iterdir()] == []


@pytest.mark.usefixtures("mounts")
def test_a_disk_without_room_for_two_checkpoints_is_known_before_the_first_step(jobs: Jobs, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = jobs.train(disk, fault=lambda: small_disk(disk, 2 * MIB), mounts=True)
    ended.is_one_error("train.output_dir", str(disk), "no room for the checkpoints", "--force")
    assert "step 1/" not in ended.log
    free, wanted = (int(number.replace(",", "")) for number in re.findall(r"(?:found|wanted): ([\d,]+) bytes", ended.log))
    assert 0 < free <= 2 * MIB < wanted


@pytest.mark.usefixtures("mounts")
def test_a_resumed_run_knows_before_the_base_is_loaded(jobs: Jobs, whole: Ended, tmp_path: Path) -> None:
    """How large a checkpoint is, the one that is gone on from tells."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def fault() -> None:
        small_disk(disk, MIB)
        shutil.copytree(whole.run_dir / "checkpoints", disk / "checkpoints")
        fill_up(disk, but=100_000)
        import qlora.train.setup as setup

        setup.build_model = lambda *_, **__: pytest.fail("the base was loaded")  # type: ignore[assignment]

    ended = jobs.train(disk, *EVERY_TWO, fault=fault, mounts=True)
    ended.is_one_error("no room for the checkpoints", str(disk), "bytes free")


@pytest.mark.usefixtures("mounts")
def test_force_tries_all_the_same(jobs: Jobs, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    fault = lambda: small_disk(disk, 2 * MIB)  # noqa: E731
    ended = jobs.train(disk, "train.max_steps=2", "--force", fault=fault, mounts=True)
    assert ended.code == 0, ended.log
    assert re.search(r"warning: --force: [\d,]+ bytes free in \S+ for 2 checkpoints of [\d,]+; a save may fail", ended.log)


def test_metrics_that_cannot_be_written_end_nothing_and_are_said_once(jobs: Jobs, whole: Ended, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    ended = jobs.train(run_dir, *EVERY_TWO)
    assert ended.code == 0, ended.log
    assert ended.log.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert f"step {STEPS}/{STEPS}" in ended.log
    assert ended.adapter == whole.adapter
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
