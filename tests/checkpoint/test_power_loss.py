"""Power that goes during a save: every state that a disk may then be in is made and opened.

What the process did to its files is recorded. A file's content is on the disk once it was flushed, and may be missing or
a part before; a new, changed or removed name is there once its folder was flushed, and may or may not be before. Of what
was not flushed, any subset is taken.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qlora.checkpoint.resume import find_checkpoint

Write = Callable[..., Path]
NUM_SUBSETS = 12  # at each point, beside all and nothing

log: list[tuple[str, ...]] = []
recording: list[Path] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Events come before what they tell of."""
    if not recording or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        return
    path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
    if not path or (event == "open" and "w" not in str(arguments[1])):
        return
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
    if Path(path).is_relative_to(recording[0]):
        log.append((event, path, *([os.fspath(arguments[1])] if event == "os.rename" else [])))


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_audit)  # cannot be taken away again; it does nothing while nothing is recorded


def record(run_dir: Path, work: Callable[[], object], *, flushes: bool) -> tuple[list[tuple[str, ...]], dict[str, bytes]]:
    """What was done to the folder, in order, and each file's content, by the name it had when it was flushed."""
    contents: dict[str, bytes] = {}
    real = os.fsync

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isfile(path):
            contents[path] = Path(path).read_bytes()
        if flushes:
            log.append(("fsync", path))
        real(handle)

    log.clear()
    recording.append(run_dir)
    os.fsync = fsync  # type: ignore[assignment]
    try:
        work()
    finally:
        os.fsync = real
        recording.clear()
    return list(log), contents


@dataclass
class Node:
    """A file or folder, by what is flushed of it and what is not."""

    content: bytes | None = None  # None is a folder
    is_flushed: bool = True
    flushed: dict[str, Node] = field(default_factory=dict)
    # Since then: (the name that vanishes, the name that appears, what it stands for).
    pending: list[tuple[str | None, str | None, Node | None]] = field(default_factory=list)

    @property
    def now(self) -> dict[str, Node]:
        return self.after(self.pending)

    def after(self, operations: list[tuple[str | None, str | None, Node | None]]) -> dict[str, Node]:
        names = dict(self.flushed)
        for gone, new, node in operations:
            if gone is not None:
                names.pop(gone, None)
            if new is not None and node is not None:
                names[new] = node
        return names

    def write_to(self, path: Path, draw: random.Random | bool) -> None:
        """Make what a disk may hold. Args: draw: which of the operations that were not flushed it has done."""

        def chosen() -> bool:
            return draw if isinstance(draw, bool) else draw.random() < 0.5

        if self.content is not None:
            part = self.content if self.is_flushed or chosen() else self.content[: len(self.content) // 2 * chosen()]
            path.write_bytes(part)
            return
        path.mkdir()
        for name, node in self.after([operation for operation in self.pending if chosen()]).items():
            node.write_to(path / name, draw)


def read(path: Path) -> Node:
    if path.is_dir():
        return Node(flushed={child.name: read(child) for child in path.iterdir()})
    return Node(path.read_bytes())


class Disk:
    """A run directory, to which what was recorded is done again."""

    def __init__(self, run_dir: Path, contents: dict[str, bytes]) -> None:
        self.run_dir, self.contents, self.top = run_dir, contents, read(run_dir)

    def node(self, path: str) -> Node:
        node = self.top
        for name in Path(path).relative_to(self.run_dir).parts:
            node = node.now[name]
        return node

    def do(self, event: str, path: str, target: str = "") -> None:
        if event == "fsync":
            node = self.node(path)
            node.flushed, node.pending, node.is_flushed = node.now, [], True
            return
        folder, name = self.node(os.path.dirname(path)), os.path.basename(path)
        if event == "os.mkdir":
            if name not in folder.now:  # otherwise it was tried and refused
                folder.pending.append((None, name, Node()))
        elif event == "open":
            folder.pending.append((None, name, Node(self.contents[path], is_flushed=False)))
        elif event == "os.rename":
            assert os.path.dirname(path) == os.path.dirname(target)
            folder.pending.append((name, os.path.basename(target), folder.now[name]))
        else:
            folder.pending.append((name, None, None))


def states(
    run_dir: Path, folder: Path, done: list[tuple[str, ...]], contents: dict[str, bytes]
) -> Iterator[tuple[int, Path]]:
    """(number of operations before the power went, a disk as it may then be)."""
    disk = Disk(run_dir, contents)
    draw = random.Random(0)
    for number in range(len(done) + 1):
        for subset, which in enumerate([True, False, *[draw] * NUM_SUBSETS]):
            path = folder / f"{number}-{subset}"
            disk.top.write_to(path, which)
            yield number, path
        if number < len(done):
            disk.do(*done[number])


def found_after_power_loss(
    run_dir: Path, write: Write, tmp_path: Path, *, flushes: bool
) -> tuple[list[tuple[int, int | None]], int]:
    """(operations done, step found) of every state while step 3 is saved and step 1 removed; and how many operations."""
    for step in (1, 2):
        write(step, keep_last=9)
    before = tmp_path / "before"
    shutil.copytree(run_dir, before)
    done, contents = record(run_dir, lambda: write(3, keep_last=2), flushes=flushes)
    shutil.rmtree(run_dir)
    before.rename(run_dir)
    (tmp_path / "states").mkdir()
    found = []
    for number, state in states(run_dir, tmp_path / "states", done, contents):
        try:
            chosen = find_checkpoint(state, "auto")
        except Exception:
            chosen = None
        found.append((number, chosen.trainer.step if chosen else None))
    return found, len(done)


def test_no_state_of_the_disk_loses_the_checkpoint_before(
    run_dir: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, number = found_after_power_loss(run_dir, write, tmp_path, flushes=True)
    assert number > 25
    assert {step for _, step in found} == {2, 3}
    # When the save has returned, it is on the disk whatever is not flushed.
    assert {step for done, step in found if done == number} == {3}
    # And a checkpoint that counts was whole in every state: none had to be passed over.
    assert "warning" not in capsys.readouterr().err


def test_without_flushing_there_would_be_states_that_do(run_dir: Path, write: Write, tmp_path: Path) -> None:
    """The test before proves nothing unless it can fail."""
    found, number = found_after_power_loss(run_dir, write, tmp_path, flushes=False)
    assert None in {step for _, step in found} or {step for done, step in found if done == number} != {3}
