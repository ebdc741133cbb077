"""Checkpoints on a network file system whose client answers from memory: names that are not there yet, stale handles.

The client is played by a layer over the interpreter's own opening and asking; what is below it are real files.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.checkpoint import reading
from qlora.checkpoint.resume import find_checkpoint
from qlora.checkpoint.save import sweep
from qlora.cli.main import main
from qlora.errors import CheckpointError
from tests.faults.children import EVERY_TWO, Ended, Jobs, two_ranks


class Client:
    """Lets opening, listing and asking for a size of some names fail, so many times.

    Attributes:
        tries: how often each name was asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[tuple[str, str], list[int]] = {}
        self.tries: Counter[tuple[str, str]] = Counter()
        monkeypatch.setattr(reading, "PAUSES", (0.001,) * len(reading.PAUSES))
        self._stand_before(monkeypatch, io, "open")
        self._stand_before(monkeypatch, os, "listdir")
        self._stand_before(monkeypatch, os, "stat")

    def _stand_before(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def asked(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            key = (name, os.path.basename(path)) if isinstance(path, str | os.PathLike) else ("", "")
            if key in self.answers:
                self.tries[key] += 1
                if self.answers[key]:
                    number = self.answers[key].pop(0)
                    raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, asked)

    def answer(self, how: str, name: str, number: int, times: int) -> None:
        """Let a name be answered with an error some times, and truly after that."""
        self.answers[how, name] = [number] * times


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(monkeypatch)


@pytest.fixture
def run_dir(whole: Ended, tmp_path: Path) -> Path:
    """A run with checkpoints after 4 and 6."""
    target = tmp_path / "run"
    shutil.copytree(whole.run_dir, target, ignore=shutil.ignore_patterns("adapter", "step-00000002", "step-00000007"))
    return target


def step_found(run_dir: Path) -> int | None:
    found = find_checkpoint(run_dir, "auto")
    return None if found is None else found.trainer.step


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("name", ["manifest.json", "COMMITTED", "optimizer.safetensors", "trainer_state.json"])
def test_a_file_that_is_there_after_all_is_read(run_dir: Path, client: Client, number: int, name: str) -> None:
    client.answer("open", name, number, len(reading.PAUSES))
    assert step_found(run_dir) == 6
    assert client.tries["open", name] > len(reading.PAUSES)


def test_a_folder_whose_handle_is_stale_is_opened_again(run_dir: Path, client: Client) -> None:
    client.answer("listdir", "step-00000006", errno.ESTALE, len(reading.PAUSES))
    assert step_found(run_dir) == 6


def test_a_marker_that_the_client_does_not_remember_counts(
    run_dir: Path, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asking for the name would be answered from memory; the folder is listed."""
    client.answer("stat", "COMMITTED", errno.ENOENT, 99)
    assert step_found(run_dir) == 6
    sweep(run_dir / "checkpoints")  # and it is not taken for the rest of a save that was cut off
    assert step_found(run_dir) == 6
    assert capsys.readouterr().err == ""


def test_trying_again_is_bounded(run_dir: Path, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.answer("open", "optimizer.safetensors", errno.ESTALE, len(reading.PAUSES) + 1)
    assert step_found(run_dir) == 4  # the next one is read: the client has answered truly since
    assert "optimizer.safetensors cannot be read (Stale file handle)" in capsys.readouterr().err
    assert client.tries["open", "optimizer.safetensors"] == len(reading.PAUSES) + 2


def test_other_errors_and_files_that_are_gone_are_not_tried_again(run_dir: Path, client: Client) -> None:
    client.answer("open", "optimizer.safetensors", errno.EIO, 1)
    assert step_found(run_dir) == 4
    assert client.tries["open", "optimizer.safetensors"] == 2  # of each checkpoint once
    (run_dir / "checkpoints/step-00000006/adapter_model.safetensors").unlink()
    client.answer("open", "adapter_model.safetensors", errno.ENOENT, 0)
    assert step_found(run_dir) == 4
    assert client.tries["open", "adapter_model.safetensors"] == 2


def test_pauses_are_seconds_in_all() -> None:
    assert 1 < sum(reading.PAUSES) < 5


def test_a_run_goes_on_through_such_a_client(jobs: Jobs, whole: Ended, run_dir: Path) -> None:
    def fault() -> None:
        client = Client(pytest.MonkeyPatch())
        client.answer("open", "manifest.json", errno.ESTALE, 2)
        client.answer("open", "adapter_config.json", errno.ENOENT, 2)
        client.answer("listdir", "step-00000006", errno.ESTALE, 1)
        client.answer("stat", "COMMITTED", errno.ENOENT, 99)

    ended = jobs.train(run_dir, *EVERY_TWO, fault=fault)
    assert ended.code == 0, ended.log
    assert "after step 6" in ended.log
    assert ended.adapter == whole.adapter


def test_two_nodes_with_folders_of_their_own_are_told_before_the_base_is_loaded(
    jobs: Jobs, run_dir: Path, tmp_path: Path
) -> None:
    """A relative path, and another working directory on each rank; the checkpoint is in the main rank's."""
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    run_dir.rename(tmp_path / "node0/run")

    def work(rank: int) -> int:
        from qlora.train import setup

        setup.build_model = lambda *_, **__: pytest.fail("the base was loaded")  # type: ignore[assignment]
        os.chdir(tmp_path / f"node{rank}")
        return main(jobs.argv(Path("run"), *EVERY_TWO))

    main_rank, other = two_ranks(work, tmp_path / "log")
    what = "does not see the checkpoint that the main rank goes on from"
    main_rank.is_one_error(what, "step-00000006", "No such file or directory", "all nodes share")
    assert other.code == 2
    assert what in other.log
    assert [path.name for path in (tmp_path / "node1").iterdir()] == []


@pytest.mark.parametrize(("number", "says"), [(errno.ENOENT, "No such file or directory"), (None, "3 bytes")])
def test_a_rank_that_does_not_see_the_folder_says_so(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int | None, says: str
) -> None:
    """As where a node has a folder of its own under the path."""
    from qlora.checkpoint.choose import _see

    folder = tmp_path / "of_this_node"
    if number is None:
        folder.mkdir()
        (folder / "optimizer.safetensors").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="does not see the checkpoint that the main rank goes on from") as raised:
        _see(folder, {"optimizer.safetensors": 99})
    assert says in str(raised.value)
    assert "all nodes share" in str(raised.value)
