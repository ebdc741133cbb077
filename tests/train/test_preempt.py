"""Being asked to stop: by signals, by more of them, by a file, and by a launcher that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora.errors import StopRequested
from qlora.train import preempt
from qlora.train.preempt import SIGNALS, StopFlag, until_stopped


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    flag = StopFlag()
    yield flag
    flag.release()


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for still has its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def soon(condition: Callable[[], Any], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_no_more(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    flag = StopFlag().listen()
    try:
        assert not flag.requested()
        os.kill(os.getpid(), number)
        assert flag.requested()
        os.kill(os.getpid(), number)  # as handed on by a launcher: the same request
        assert flag.reason == number.name
    finally:
        flag.release()
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "stop requests" not in [thread.name for thread in threading.enumerate()]


def test_a_signal_before_the_ranks_meet_ends_what_is_being_done(flag: StopFlag) -> None:
    flag.listen(at_once=True)
    with pytest.raises(StopRequested):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # tidying up is not interrupted
    with pytest.raises(StopRequested):
        flag.meet()


def test_what_asks_before_the_ranks_meet_interrupts_a_wait(flag: StopFlag) -> None:
    flag.watch(lambda: "a file")
    flag.listen(at_once=True)
    with pytest.raises(StopRequested, match="a file"):
        time.sleep(30)
    assert flag.reason == "a file"


def run(script: str) -> subprocess.CompletedProcess[str]:
    start = "import os, signal, sys, time; from qlora.train import preempt\n"
    command = [sys.executable, "-c", start + script]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


WRITES = "flag = preempt.StopFlag(); flag.on_end = lambda *how: print(*how, flush=True)\n"


# Deaf in C code, as in a collective: a semaphore that nobody will raise, which runs no handler of Python's.
DEAF = "import ctypes; ctypes.CDLL(None).sem_wait(ctypes.byref((ctypes.c_long * 8)()))"


@pytest.mark.parametrize("busy", ["time.sleep(0.1)", DEAF])
def test_a_later_second_signal_ends_at_once_and_is_written_down(busy: str) -> None:
    # The second one comes from outside, a moment later.
    script = (
        "preempt.SAME_REQUEST_SECONDS = 0.05\n" + WRITES + "flag.listen()\n"
        "os.system(f'(sleep 0.5; kill -TERM {os.getpid()}; sleep 0.5; kill -TERM {os.getpid()}) &')\n"
        f"while True: {busy}\n"
    )
    done = run(script)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "a second signal (SIGTERM) 143\n"), done.stderr
    assert "ended at once, without saving" in done.stderr


def test_a_disk_that_hangs_does_not_keep_a_rank_from_ending() -> None:
    done = run(
        "preempt.SAME_REQUEST_SECONDS = 0.05; preempt.RECORD_SECONDS = 0.2\n"
        "flag = preempt.StopFlag().listen(); flag.on_end = lambda *how: time.sleep(60)\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.3)\n"
        "time.sleep(30)"
    )
    assert done.returncode == 128 + signal.SIGINT


def test_a_rank_that_waits_in_vain_for_the_others_ends() -> None:
    done = run(
        "preempt.MEETING_SECONDS = 0.2\n" + WRITES + "flag.listen(); flag.meet()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\ntime.sleep(30)"
    )
    assert (done.returncode, done.stdout) == (75, "SIGUSR1, while other ranks were waited for 75\n")


@pytest.mark.parametrize("launched", [True, False])
def test_a_lost_launcher_is_a_request_and_a_lost_shell_is_not(monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    for name in preempt.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(preempt, "LOOK_SECONDS", 0.01)
    flag = StopFlag().listen()
    try:
        looks: list[bool] = []
        flag.watch(lambda: looks.append(True))
        assert soon(lambda: looks)
        assert not flag.requested()
        monkeypatch.setattr(os, "getppid", lambda: -1)
        looks.clear()
        assert soon(lambda: flag.requested() or len(looks) > 2)
        assert flag.reason == ("the launcher is gone" if launched else None)
    finally:
        flag.release()


def test_a_rank_that_others_stop_first_knows_why_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank looks twice a second: the others may have agreed to stop before this one's next look."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    flag = StopFlag()
    assert flag.look_now() is None
    flag.watch(lambda: "the file STOP")
    assert flag.look_now() == "the file STOP"
    orphan = StopFlag()
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert (orphan.look_now(), orphan.reason) == ("the launcher is gone",) * 2


def test_an_orphan_that_comes_to_no_step_ends() -> None:
    """The middle process starts a rank and is killed."""
    rank = (
        "import os, sys, time; from qlora.train import preempt\n"
        "preempt.ORPHAN_SECONDS = 0.3; preempt.LOOK_SECONDS = 0.05\n" + WRITES + "flag.listen()\n"
        "print('here', flush=True)\nos.write(1, b'') ; time.sleep(60); print('still here')"
    )
    middle = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, stderr=2, "
        "start_new_session=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", middle, rank], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    # Standard error stays open until the rank closes it in its exit, of which the rest may take a moment more.
    assert "the launcher is gone, and the ranks do not come to the end of a step" in done.stderr
    assert soon(lambda: gone(int(done.stdout)))


def test_listening_outside_the_main_thread_does_nothing() -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    thread = threading.Thread(target=lambda: StopFlag().listen().release())
    thread.start()
    thread.join()
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_batches_end_where_the_ranks_agree() -> None:
    asked: list[int] = []

    def together(work: Callable[[], None]) -> None:
        asked.append(1)
        if len(asked) == 3:
            raise StopRequested

    runtime: Any = SimpleNamespace(together=together)
    seen = []
    with pytest.raises(StopRequested):
        seen.extend(until_stopped(["a", "b", "c", "d"], runtime))
    got = until_stopped(["a"], SimpleNamespace(together=lambda work: work()))  # type: ignore[arg-type]
    assert (seen, list(got)) == (["a", "b"], ["a"])
