"""Reading what another host has just written, through a network file system.

An NFS client remembers for up to a minute that a name was not there, and may hold the handle of a file or folder that was
replaced on the server since: ENOENT for a file that exists, ESTALE for one that exists anew. Both happen where a job goes
on on another node than it ran on before, and where ranks on other nodes open what the main rank has found. Opening a
folder makes the client ask its server; looking a name up does not.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PAUSES = (0.1, 0.4, 1.6)  # seconds, between four tries


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises OSError: FileNotFoundError at once where its folder does not list it."""
    return _patiently(path.read_bytes, path)


def size_of(path: Path) -> int:
    """The size of a file in bytes. Raises OSError as `read_bytes` does."""
    return _patiently(lambda: path.stat().st_size, path)


def is_listed(path: Path) -> bool:
    """Whether a name is in its folder, as the server says now; False where there is no such folder."""
    try:
        return _patiently(lambda: path.name in os.listdir(path.parent), path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _patiently(look: Callable[[], T], path: Path) -> T:
    for pause in PAUSES:
        try:
            return look()
        except FileNotFoundError:
            if path.name not in os.listdir(path.parent):
                raise
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        time.sleep(pause)
    return look()
