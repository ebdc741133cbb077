"""The folder a verb is to make: nothing that is there is ever written over."""

from __future__ import annotations

from pathlib import Path

from qlora.errors import QloraError


def require_empty(out: Path) -> None:
    """Raise QloraError unless the folder does not exist or is empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QloraError(
            "would overwrite what is there",
            place=str(out),
            found="a folder with files" if out.is_dir() else "a file",
            wanted="a folder that does not exist or is empty",
        )
