"""A model folder's files, looked at without torch: config.json, which files hold weights, what their headers say.

Format of a safetensors file: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import BaseModelError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
# Bytes an element, by the name a dtype has in a header.
ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEMSIZES |= {"F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class HeaderEntry:
    """What a header says of one tensor.

    Attributes:
        dtype: a key of `ITEMSIZES`.
        start, stop: its bytes, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises BaseModelError where it is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not a JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        raise BaseModelError(f"not JSON: {error}", place=str(path)) from error
    return config


def find_weight_files(folder: Path, *, next_step: str = "download or copy them, or mend the index") -> list[Path]:
    """The safetensors files of a model folder, by its index where there is one; [] where there are none.

    Args:
        next_step: what can be done about files that are missing.

    Raises:
        BaseModelError: the index is damaged, names a file that is missing, or names none.
    """
    index, single = folder / INDEX_NAME, folder / "model.safetensors"
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BaseModelError(f"damaged index: {error}", place=str(index)) from error
    missing = [file.name for file in files if file.parent != folder or not file.is_file()]
    if missing or not files:
        raise BaseModelError(
            "the index names files that are not there",
            place=str(index),
            found=", ".join(missing[:5]) or "no files",
            next_step=next_step,
        )
    return files


def read_header(file: Path) -> tuple[list[HeaderEntry], dict[str, str]]:
    """What a safetensors file says of its tensors, and its free-form metadata. Reads the header alone.

    Whether the data behind it is all there is not looked at.

    Raises:
        BaseModelError: not a safetensors file, damaged, or a tensor of an unknown dtype.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise BaseModelError(
                "damaged safetensors header: not a safetensors file, or cut short", place=str(file), found=f"{size} bytes"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata is not text")
        entries = []
        for name, item in header.items():
            begin, end = item["data_offsets"]
            if item["dtype"] not in ITEMSIZES:
                raise BaseModelError(f"{name} is of a dtype that is not read here", place=str(file), found=item["dtype"])
            if any(type(n) is not int or n < 0 for n in (begin, end, *item["shape"])):
                raise ValueError(f"{name} has a shape or place that is no whole number")
            needed = math.prod(item["shape"]) * ITEMSIZES[item["dtype"]]
            if end - begin != needed:
                raise ValueError(f"{name} has {end - begin} bytes, its shape needs {needed}")
            entries.append(HeaderEntry(name, item["dtype"], tuple(item["shape"]), 8 + length + begin, 8 + length + end))
        _refuse_overlaps(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseModelError(f"damaged safetensors header: {error}", place=str(file)) from error
    return entries, metadata


def _refuse_overlaps(entries: Iterable[HeaderEntry]) -> None:
    free = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start < free:
            raise ValueError(f"{entry.name} begins inside another tensor")
        free = entry.stop


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table
