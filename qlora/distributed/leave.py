"""How a rank ends: at once, when everything is written.

gloo's threads may hold tensors for a moment after the last collective. Where one lets go of such a tensor while the
interpreter is being torn down, it asks for Python's lock, is ended for it inside of a destructor, and the process aborts
(torch 2.13, pytorch/pytorch#190489): a job that is done would count as failed. Leaving the process group does not wait for
these threads as long as DeepSpeed keeps a reference to it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with an exit code. Exit handlers run and streams are flushed; the interpreter is not torn down."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_one_of_several() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"
