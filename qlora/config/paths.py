"""Which values are paths, and what to say about a path that is not there.

A value such as `owner/name` may be a folder or a hub id. It is taken for a path where nothing else can be meant; only
then does a missing file become an error before anything is downloaded or loaded.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

_TEXT_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".md", ".parquet", ".tsv", ".txt", ".yaml", ".yml")
_OTHER_SUFFIXES = (".bin", ".gguf", ".gz", ".jinja", ".jinja2", ".pt", ".safetensors", ".zst")
FILE_SUFFIXES = frozenset((*_TEXT_SUFFIXES, *_OTHER_SUFFIXES))


def looks_like_path(value: str) -> bool:
    """Tell whether `value` can only be a path: it exists, starts with `.`, `/` or `~`, has a file's suffix, or is deeper
    than `owner/name`, which is as deep as a hub id gets. A value with `://` is an address, never a path."""
    if "://" in value:
        return False
    if value.startswith((".", "/", "~")) or value.endswith("/") or value.count("/") > 1:
        return True
    return Path(value).suffix.lower() in FILE_SUFFIXES or exists(value)


def exists(value: str | Path) -> bool:
    """Tell whether there is a file or folder, False as well for a name no file system could hold."""
    try:
        return os.path.exists(value)
    except (OSError, ValueError):
        return False


def missing_hint(value: str | Path, suffixes: tuple[str, ...] = ()) -> str:
    """Return what to try for a path that does not exist: names close to it, or the first folder of it that is missing.

    Args:
        value: the missing path, as the user wrote it.
        suffixes: when given, files with these suffixes in the same folder are named where no name is close.
    """
    text = str(value)
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        return f"~ is not expanded here; write {expanded}" + ("" if exists(expanded) else ", which does not exist either")
    path = Path(text)
    parent = path.parent
    if not exists(parent):
        while not exists(parent.parent):
            parent = parent.parent
        return f"the folder {parent} does not exist{_close_to(parent)}; {_relative_to(path)}"
    near = _close_to(path)
    if near:
        return near.removeprefix("; ")
    if suffixes:
        here = sorted(entry for entry in _entries(parent) if entry.endswith(suffixes))[:5]
        if here:
            return f"{parent} holds {', '.join(here)}"
    return f"no name in {parent} is close to it; {_relative_to(path)}"


def _close_to(path: Path) -> str:
    close = difflib.get_close_matches(path.name, _entries(path.parent), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _relative_to(path: Path) -> str:
    return "check the path" if path.is_absolute() else f"relative paths start at the working directory, {os.getcwd()}"
