"""A signal while rows are tokenized, which takes as long as it takes: the job is out in seconds, and its cache intact.

Signals in steps, evaluations, loads and saves are in tests/e2e/test_stop.py, on two ranks.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import EVERY_TWO, Ended, Jobs

MOST_SECONDS = 5.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_tokenizing_that_takes_long_is_left_at_once(
    jobs: Jobs, whole: Ended, tmp_path: Path, number: signal.Signals
) -> None:
    cache, asked, over = tmp_path / "cache", tmp_path / "asked", tmp_path / "over"

    def fault() -> None:
        from qlora.data import prepare

        def ask() -> None:
            time.sleep(0.2)
            asked.write_text(repr(time.time()))
            os.kill(os.getpid(), number)

        def slow(*_: Any, **__: Any) -> None:
            threading.Thread(target=ask).start()
            time.sleep(60)

        prepare.encode_rows = slow  # type: ignore[assignment]

    more = (f"data.cache_dir={cache}", "train.max_steps=3")
    ended = jobs.train(tmp_path / "run", *more, fault=fault, after=lambda: over.write_text(repr(time.time())))
    assert ended.code == 75, ended.log
    assert float(over.read_text()) - float(asked.read_text()) < MOST_SECONDS
    assert (ended.status["state"], ended.status["resumable"]) == ("stopped", False)
    assert number.name in ended.status["reason"]
    assert {file.suffix for file in cache.iterdir()} <= {".lock"}
    again = jobs.train(tmp_path / "run", *EVERY_TWO, f"data.cache_dir={cache}")
    assert again.code == 0, again.log
    assert again.adapter == whole.adapter
