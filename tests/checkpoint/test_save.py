"""Writing checkpoints while the process dies, the disk fills up or the power goes, at every single file operation.

Audit events come before each operation of the interpreter on files, so a hook sees them all; fsync has none and is
wrapped. The process that dies is a forked child.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.checkpoint import state
from qlora.checkpoint.resume import find_checkpoint
from qlora.checkpoint.save import prune, set_aside_after, tidy
from qlora.errors import CheckpointError

Write = Callable[..., Path]
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fsync"}
DIED = 99

on_operation: list[Callable[[str, tuple[Any, ...]], None]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if on_operation and event in OPERATIONS:
        hook = on_operation.pop()
        try:
            hook(event, arguments)
        finally:
            on_operation.append(hook)


@pytest.fixture(scope="session", autouse=True)
def _hook() -> None:
    sys.addaudithook(_audit)  # cannot be taken away again; it does nothing while on_operation is empty


@pytest.fixture(autouse=True)
def _fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        _audit("fsync", (os.readlink(f"/proc/self/fd/{handle}"),))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def watch(hook: Callable[[str, tuple[Any, ...]], None], work: Callable[[], object]) -> None:
    on_operation.append(hook)
    try:
        work()
    finally:
        on_operation.clear()


def steps(run_dir: Path) -> list[int]:
    return [state.step_of(folder) for folder in state.committed(run_dir)]


def die_at(number: int, work: Callable[[], object], *, torn: bool) -> bool:
    """Do the work in a child that exits before its number-th operation; `torn` leaves a part of the file it opens."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, DIED)
        return code == DIED
    done = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if done == number:
            if torn and event == "open" and "w" in str(arguments[1]):
                os.write(os.open(arguments[0], os.O_WRONLY | os.O_CREAT), b"par")
            os._exit(DIED)
        done += 1

    code = 1
    try:
        watch(hook, work)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("torn", [False, True])
def test_a_process_that_dies_at_any_operation_loses_nothing(run_dir: Path, write: Write, torn: bool) -> None:
    """Saving step 3 while 1 and 2 are there, of which 1 is then removed."""
    number, seen = 0, set()
    while True:
        for step in (1, 2):
            if step not in steps(run_dir):
                write(step, keep_last=9)
        died = die_at(number, lambda: write(3, keep_last=2), torn=torn)
        found = find_checkpoint(run_dir, "auto")
        assert found is not None
        assert found.trainer.step in ((2, 3) if died else (3,))
        seen.add(found.trainer.step)
        if number % 2:
            write(4, keep_last=3)  # the next save clears away what was left
        else:
            tidy(run_dir, keep_last=2)  # or the next start
            assert len(steps(run_dir)) == 2
        names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert names == [state.folder_name(step) for step in steps(run_dir)]
        if not died:
            break
        for folder in set_aside_after(run_dir, 2):
            folder.rename(run_dir.parent / f"{folder.name}-{number}")
        number += 1
    assert seen == {2, 3}
    assert number > 25  # files, folders, syncs, renames, removals


def test_a_full_disk_at_any_operation_is_an_error_and_loses_nothing(run_dir: Path, write: Write) -> None:
    write(1)
    write(2)
    errors = []
    for number in range(1000):
        done = 0

        def hook(event: str, arguments: tuple[Any, ...], number: int = number) -> None:
            nonlocal done
            done += 1
            if done == number + 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        try:
            watch(hook, lambda: write(3, keep_last=9))
        except CheckpointError as error:
            errors.append(str(error))
            assert not list((run_dir / "checkpoints").glob(".*.tmp"))
            found = find_checkpoint(run_dir, "auto")
            assert found is not None
            assert found.trainer.step in (2, 3)
        if done <= number:
            break
        for folder in set_aside_after(run_dir, 2):
            folder.rename(run_dir.parent / f"{folder.name}-{number}")
    assert len(errors) > 15
    assert all("No space left on device" in error and "bytes to write" in error for error in errors)
    assert steps(run_dir) == [1, 2, 3]


def test_everything_is_on_the_disk_before_what_depends_on_it(run_dir: Path, write: Write) -> None:
    """The order that a loss of power asks for: files, their folder, the new name, the marker, and only then removals."""
    write(1)
    log: list[tuple[str, str]] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or "w" in str(arguments[1]):
            log.append((event, str(arguments[0])))

    watch(hook, lambda: write(2, keep_last=1))
    parent = run_dir / "checkpoints"
    final = str(parent / "step-00000002")
    temporary = next(name for event, name in log if event == "os.mkdir" and name.endswith(".tmp"))
    renamed = log.index(("os.rename", temporary))
    written = [name for event, name in log[:renamed] if event == "open"]
    assert len(written) == 4 + 1
    for name in [*written, temporary]:
        assert ("fsync", name) in log[:renamed]
    marker = next(name for event, name in log if event == "open" and "COMMITTED" in name)
    assert Path(marker).parent == Path(final)
    marked = log.index(("os.rename", marker))
    assert ("fsync", str(parent)) in log[renamed : log.index(("open", marker))]
    assert ("fsync", marker) in log[:marked]
    removed = log.index(("os.rename", str(parent / "step-00000001")))
    assert ("fsync", final) in log[marked:removed]
    assert ("fsync", str(run_dir)) in log[: log.index(("os.mkdir", temporary))]


@pytest.mark.parametrize("keep_last", [1, 2, 3, 4, 9])
def test_pruning_keeps_the_newest(run_dir: Path, write: Write, keep_last: int) -> None:
    for step in (2, 10, 30, 100):
        newest = write(step, keep_last=99)
    prune(newest, keep_last)
    assert steps(run_dir) == [2, 10, 30, 100][-keep_last:]


def test_checkpoints_of_later_steps_are_not_pruned_nor_counted(run_dir: Path, write: Write) -> None:
    for step in (10, 20, 30):
        write(step, keep_last=9)
    write(15, keep_last=2)
    assert steps(run_dir) == [10, 15, 20, 30]


def test_order_is_by_step_and_never_by_time(run_dir: Path, write: Write) -> None:
    for step in (100, 20, 3):
        folder = write(step, keep_last=9)
        os.utime(folder, (step, step))
    assert steps(run_dir) == [3, 20, 100]
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    assert found.trainer.step == 100


def test_what_stands_in_the_way_is_replaced(run_dir: Path, write: Write) -> None:
    write(5)
    damaged = run_dir / "checkpoints/step-00000005/adapter_model.safetensors"
    damaged.write_bytes(b"")
    write(5)
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    assert found.folder == damaged.parent


def test_other_things_in_the_folder_are_left_alone(run_dir: Path, write: Write) -> None:
    parent = run_dir / "checkpoints"
    parent.mkdir()
    for name in ("step-best", "notes", ".hidden"):
        (parent / name).mkdir()
    (parent / "step-00000009").write_text("a file")
    write(1, keep_last=1)
    write(2, keep_last=1)
    names = [".hidden", "notes", "step-00000002", "step-00000009", "step-best"]
    assert sorted(path.name for path in parent.iterdir()) == names


def test_what_is_linked_here_is_left_where_it_is(run_dir: Path, write: Write, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    write(1).rename(moved)
    (run_dir / "checkpoints/step-00000001").symlink_to(moved)
    (run_dir / "checkpoints/.step-00000009.7.tmp").write_text("a file")
    assert steps(run_dir) == [1]
    write(2, keep_last=1)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000002"]
    assert (moved / "COMMITTED").is_file()


def test_setting_aside_deletes_nothing_and_never_collides(run_dir: Path, write: Write) -> None:
    for _ in range(2):
        for step in (1, 2, 3):
            write(step, keep_last=9)
        renamed = set_aside_after(run_dir, 1)
        assert len(renamed) == 2
        assert all((folder / "COMMITTED").exists() for folder in renamed)
    assert steps(run_dir) == [1]
    assert len(list((run_dir / "checkpoints").glob("aside-*"))) == 4
    assert set_aside_after(run_dir, 1) == []
    assert set_aside_after(run_dir.parent / "nothing", 0) == []
