"""A file system that is slow: a save that takes as long as a launcher waits is warned of, once, and loses nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qlora.checkpoint.saver import warn_if_slow
from tests.faults.children import Ended, Jobs

TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def test_the_first_save_that_is_slow_is_warned_of_once(jobs: Jobs, whole: Ended, tmp_path: Path) -> None:
    """Every flush takes a while; the launcher of this job would wait for 6 s."""

    def fault() -> None:
        fsync = os.fsync

        def slow(handle: int) -> None:
            time.sleep(0.12)
            fsync(handle)

        os.fsync = slow
        os.environ[TIMEOUT] = "6"

    ended = jobs.train(tmp_path / "run", "checkpoint.every_steps=4", fault=fault)
    assert ended.code == 0, ended.log
    assert ended.log.count("warning: the first checkpoint took") == 1
    assert "kills its ranks after 6 s" in ended.log
    assert ended.adapter == whole.adapter
    assert ended.losses == whole.losses


def test_no_word_of_one_that_is_not(whole: Ended) -> None:
    assert "the first checkpoint took" not in whole.log


@pytest.mark.parametrize(("timeout", "seconds", "warns"), [(None, 24.9, False), (None, 25.1, True), ("300", 290, False)])
def test_the_limit_is_what_the_launcher_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], timeout: str | None, seconds: float, warns: bool
) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    if timeout:
        monkeypatch.setenv(TIMEOUT, timeout)
    warn_if_slow(seconds)
    assert ("qlora stop" in capsys.readouterr().err) == warns
