"""A rank's end: its exit code, what it printed, its exit handlers and threads; and no teardown after them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading, time
from qlora.distributed.leave import leave

class Canary:
    def __del__(self):
        print("torn down", flush=True)

canary = Canary()
atexit.register(lambda: print("handler"))
def work():
    time.sleep(0.2)
    print("thread")
threading.Thread(target=work).start()
print("main", end="")
print("error", end="", file=sys.stderr)
leave(75)
"""


def test_everything_that_was_begun_is_done_and_nothing_is_torn_down() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert done.stdout == "mainthread\nhandler\n"
    assert done.stderr == "error"


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_the_command_keeps_its_exit_code(world_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    done = subprocess.run([sys.executable, "-m", "qlora", "train"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "CONFIG" in done.stderr
