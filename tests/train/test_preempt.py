"""Being asked to stop: by signals, by more of them, and by a launcher that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from qlora.train import preempt
from qlora.train.preempt import SIGNALS, StopFlag


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_no_more(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    flag = StopFlag().listen()
    try:
        assert not flag.requested()
        os.kill(os.getpid(), number)
        assert flag.requested()
        os.kill(os.getpid(), number)  # as handed on by a launcher: the same request
        assert flag.requested()
    finally:
        flag.release()
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_later_second_signal_ends_at_once() -> None:
    script = (
        "import os, signal, time; from qlora.train import preempt; preempt.SAME_REQUEST_SECONDS = 0.05\n"
        "flag = preempt.StopFlag().listen()\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("launched", [True, False])
def test_a_lost_launcher_is_a_request_and_a_lost_shell_is_not(monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    for name in preempt.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    flag = StopFlag()
    assert not flag.requested()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert flag.requested() is launched


def test_listening_outside_the_main_thread_does_nothing() -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    thread = threading.Thread(target=lambda: StopFlag().listen())
    thread.start()
    thread.join()
    assert [signal.getsignal(n) for n in SIGNALS] == before
