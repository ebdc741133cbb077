"""What ships inside the package: the tiny base model, and the code that made it and shows it at work.

Importing this module costs nothing: no torch, no file is read.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["tiny_path"]


def tiny_path() -> Path:
    """Return the folder of the embedded base (what `builtin:tiny` names), a Hugging Face folder."""
    return Path(__file__).resolve().parent / "tiny"
