"""Names inside an adapter's folder, and its JSON, read without trust. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from qlora.errors import AdapterError

MAX_JSON_BYTES = 64 << 20


def inside(folder: Path, name: str) -> Path:
    """The path of a regular file in the folder. Raises AdapterError for a name or a link that leads out of it."""
    pure = PurePosixPath(name)
    path = folder / name
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        raise AdapterError("leads out of its folder", place=str(folder), found=repr(name), wanted="a name inside the folder")
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise AdapterError("is missing", place=str(path)) from error
    if not resolved.is_relative_to(folder.resolve()):
        raise AdapterError(
            "is a link that leads out of its folder",
            place=str(path),
            found=str(resolved),
            next_step="make a copy without links, with cp -rL, if you trust where it leads",
        )
    if not resolved.is_file():
        raise AdapterError("is not a regular file", place=str(path))
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object that is a file of the folder. Raises AdapterError where it is none, or holds a key twice."""
    path = inside(folder, name)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}", place=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"is not JSON: {error}", place=str(path)) from error
    if not isinstance(value, dict):
        raise AdapterError("is not a JSON object", place=str(path), found=short(value))
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for json.loads(object_pairs_hook=...). Raises ValueError where a key is given twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is given twice")
    return values


def short(value: object) -> str:
    """What a value is, in no more than a line."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
