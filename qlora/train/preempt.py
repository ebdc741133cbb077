"""Being asked to stop: by a signal, by `qlora stop`, by a launcher that is gone.

A request sets a flag and no more: the ranks agree on it where they meet anyway, at the end of a step, between tensors of
the base that is loaded, between batches of an evaluation. Before they have met there is nothing to agree on, and a
request ends a rank where it stands.

A thread does the looking. Python runs its signal handlers in the main thread, between two of its instructions, which a
collective that waits for another rank keeps from coming; the thread gets each signal's number from the interpreter's
wake-up pipe, so that a second signal ends the rank at once wherever it is. The run directory's file system may be slow:
nothing but this thread waits for it.

A scheduler sends its signal to all processes of a job, and the launcher, having got it too, hands it on: what arrives
within two seconds is one request.

Launchers start ranks in sessions of their own, so that nothing ends these when a launcher is killed: a rank that has lost
it asks to stop, and if the others cannot be brought to agree it ends by itself.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from qlora.errors import EXIT_BUG, EXIT_STOPPED, StopRequested

if TYPE_CHECKING:
    from qlora.distributed.runtime import Runtime

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 2.0
LOOK_SECONDS = 0.5
RECORD_SECONDS = 2.0  # how long a rank that ends at once may take to say so
MEETING_SECONDS = 5.0  # ranks that all want to meet do so in less
ORPHAN_SECONDS = 600.0  # a step and a save of a large model, with room to spare
LAUNCHER_VARIABLES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


@dataclass(frozen=True)
class End:
    """Why a rank is to end at once: in words for status.json, with which exit code, and what is said on standard error."""

    reason: str
    code: int
    text: str


class StopFlag:
    """Whether this rank was asked to stop, and why.

    Attributes:
        reason: what asked first, in words; None where nothing has.
        on_end: told why this rank ends at once, and with which code, in another thread; it may write that down.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.on_end: Callable[[str, int], None] | None = None
        self._first_signal: float | None = None
        self._asked_at = 0.0
        # Without a launcher the parent is a shell, which may well leave before its job does (nohup).
        launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        self._launcher = os.getppid() if launched else None
        self._orphan_since: float | None = None
        self._at_once = self._meets = False
        self._looks: list[Callable[[], str | None]] = []
        self._ends: list[Callable[[], End | None]] = []
        self._former: dict[int, Any] = {}
        self._former_wakeup = -1
        self._pipe: tuple[int, int] | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def requested(self) -> bool:
        """Whether this rank was asked to stop. Rank-local, costs nothing."""
        return self.reason is not None

    def look_now(self) -> str | None:
        """The reason, looked for at once where this rank's thread has seen none: another rank's may have been faster.

        Rank-local.
        """
        if self.reason is None and self._is_orphan():
            self._ask("the launcher is gone")
        for look in self._looks if self.reason is None else ():
            if reason := look():
                self._ask(reason)
                break
        return self.reason

    def _is_orphan(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher

    def listen(self, *, at_once: bool = False) -> StopFlag:
        """Take over SIGTERM, SIGINT and SIGUSR1 in this process; Python allows that in the main thread alone.

        Args:
            at_once: a request raises StopRequested in the main thread, until `meet` is called.
        """
        self._at_once = at_once
        if threading.current_thread() is not threading.main_thread():
            return self
        read, write = os.pipe()
        for end in (read, write):
            os.set_blocking(end, False)
        self._pipe = (read, write)
        self._former_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="stop requests", daemon=True)
        self._thread.start()
        return self

    def meet(self) -> None:
        """The ranks are about to meet: this one may wait for another that has stopped before, and does not wait long then.

        Raises:
            StopRequested: a stop was asked for already.
        """
        self._at_once, self._meets = False, True
        if self.reason is not None:
            raise StopRequested(self.reason)

    def have_met(self) -> None:
        """From here on the ranks agree before they stop."""
        self._meets = False

    def watch(self, look: Callable[[], str | None]) -> None:
        """Also ask this twice a second, in a thread: it gives a reason to stop, or None."""
        self._looks.append(look)

    def end_when(self, look: Callable[[], End | None]) -> None:
        """Also ask this twice a second, in a thread: what it gives ends this rank at once, wherever it waits."""
        self._ends.append(look)

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        if self._pipe is None:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wakeup)
        self._released.set()
        os.write(self._pipe[1], b"\0")
        if self._thread is not None:
            self._thread.join(timeout=RECORD_SECONDS)
            if not self._thread.is_alive():
                for end in self._pipe:
                    os.close(end)
        self._former, self._pipe = {}, None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)
        if self._at_once:
            self._at_once = False  # what is tidied up on the way out is not to be interrupted
            raise StopRequested(self.reason)

    def _ask(self, reason: str) -> None:
        if self.reason is None:
            self._asked_at = time.monotonic()
            self.reason = reason

    # The watching thread

    def _watch(self) -> None:
        assert self._pipe is not None
        read = self._pipe[0]
        while not self._released.is_set():
            if select.select([read], [], [], LOOK_SECONDS)[0]:
                for number in os.read(read, 4096):
                    if number in SIGNALS:
                        self._note(number)
            elif not self._released.is_set():
                self._look()

    def _note(self, number: int) -> None:
        """A signal has arrived, whatever the main thread is doing."""
        name = signal.Signals(number).name
        self._ask(name)
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > SAME_REQUEST_SECONDS:
            self._end_at_once(f"a second signal ({name})", 128 + number)  # as shells count

    def _look(self) -> None:
        """What is not a signal: a launcher that is gone, the stop file."""
        for look_for_end in self._ends:
            if end := look_for_end():
                self._end_at_once(end.reason, end.code, end.text)
        before = self.reason
        if self._is_orphan():
            now = time.monotonic()
            self._orphan_since = self._orphan_since or now
            if now - self._orphan_since > ORPHAN_SECONDS:
                self._end_at_once("the launcher is gone, and the ranks do not come to the end of a step", EXIT_BUG)
        self.look_now()
        if before is None and self.reason is not None and self._at_once:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        if self._meets and self.reason is not None and time.monotonic() - self._asked_at > MEETING_SECONDS:
            self._end_at_once(f"{self.reason}, while other ranks were waited for", EXIT_STOPPED)

    def _end_at_once(self, reason: str, code: int, text: str | None = None) -> None:
        def record() -> None:
            with suppress(OSError):
                os.write(2, f"{text or f'{reason}: ended at once, without saving'}\n".encode(errors="replace"))
            if self.on_end is not None:
                self.on_end(reason, code)

        # The disk may be what hangs, or the terminal.
        writer = threading.Thread(target=record, daemon=True)
        writer.start()
        writer.join(RECORD_SECONDS)
        os._exit(code)


def stop_here(runtime: Runtime) -> None:
    """A place between two pieces of work. Collective. Raises StopRequested on every rank where one was asked to stop."""
    runtime.together(lambda: None)


def until_stopped(batches: Iterable[T], runtime: Runtime) -> Iterator[T]:
    """Batches, of which every rank has the same number, with such a place before each. Collective."""
    for batch in batches:
        stop_here(runtime)
        yield batch
