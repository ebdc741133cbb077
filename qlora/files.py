"""Writing files so that a crash at any moment leaves the old content or the new, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeAlias


class Pieces(Protocol):
    """The content of a file that is too large to be made whole."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The content in order; the same at every call."""


Content: TypeAlias = bytes | Pieces


def chunks_of(content: Content) -> Iterator[bytes | memoryview]:
    """The pieces of a file's content, whichever way it is given."""
    if isinstance(content, bytes):
        yield content
    else:
        yield from content.chunks()


def write_file(path: Path, content: Content) -> None:
    """Write beside, flush to the disk, rename over. Raises OSError; the old file is untouched then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks_of(content):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sweep_unfinished(folder: Path) -> None:
    """Remove what killed processes left of `write_file`. Raises OSError. Rank-local; for the only one who writes there."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.name.split(".")[-2].isdigit():
            leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
