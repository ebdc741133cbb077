"""Importing what does the work, without looking for garbage meanwhile.

Torch and transformers are thousands of modules and some hundred thousand objects, all of which stay. Python's collector goes
through them again and again while they are made, and finds nothing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def modules_that_stay() -> Iterator[None]:
    """What is imported inside is never looked through for garbage, now or later (`gc.freeze`).

    For the start of a process that does one job. Where torch is there already the interpreter is somebody else's, such as
    a test's or a notebook's, and what it holds might be garbage one day: nothing is changed then.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
