"""Where this process's main thread is, as another thread sees it."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

# Backward passes hold collectives, too.
_WAITING_PLACES = ("/torch/distributed/", "/torch/autograd/", "/deepspeed/comm/", "/deepspeed/runtime/")
_SHOWN_FRAMES = 8


def of_main_thread() -> tuple[str, bool]:
    """File, line and function where it is, and whether ranks wait for one another there."""
    frame = _main_frame()
    if frame is None:
        return "", False
    path = frame.f_code.co_filename
    where = f"{'/'.join(Path(path).parts[-2:])}:{frame.f_lineno}, {frame.f_code.co_name}"
    return where, any(place in path for place in _WAITING_PLACES)


def show(label: str) -> None:
    """Write on standard error how it came there, the innermost call last."""
    if (frame := _main_frame()) is not None:
        stack = "".join(traceback.format_stack(frame)[-_SHOWN_FRAMES:])
        os.write(2, f"{label}\n{stack}".encode(errors="replace"))


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)
