"""Being asked to stop: a signal sets a flag, the ranks agree on it at the end of a step, a second signal ends at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by the first signal. The handlers do nothing else, so that a step or a save is never torn."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> StopFlag:
        """Take over SIGTERM, SIGINT and SIGUSR1 in this process."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
