"""Being asked to stop: a signal sets a flag, the ranks agree on it at the end of a step, a second signal ends at once.

A scheduler sends its signal to all processes of a job, and the launcher, having got it too, hands it on: what arrives
within two seconds is one request.

A rank whose launcher is gone asks to stop as well. Launchers start ranks in sessions of their own, so that nothing else
would ever end them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 2.0
LAUNCHER_VARIABLES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


class StopFlag:
    """Set by the first signal. The handlers do nothing else, so that a step or a save is never torn."""

    def __init__(self) -> None:
        self._first_signal: float | None = None
        # Without a launcher the parent is a shell, which may well leave before its job does (nohup).
        launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        self._launcher = os.getppid() if launched else None
        self._former: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether this rank was asked to stop, or has lost its launcher. Rank-local."""
        return self._first_signal is not None or (self._launcher is not None and os.getppid() != self._launcher)

    def listen(self) -> StopFlag:
        """Take over SIGTERM, SIGINT and SIGUSR1 in this process; Python allows that in the main thread alone."""
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
