"""Facts as two aligned columns, or as JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import typer

from qlora.cli.failures import printable


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print labels and values on standard output, never wrapped; labels are bold on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        console.print(Text.assemble((f"{label:<{width}}", "bold"), "  ", printable(value)), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON every parser reads: numbers that JSON lacks (NaN, infinities) become null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def size_text(num_bytes: int) -> str:
    """Return a size for a human: bytes up to 1 KiB, then KiB, MiB, GiB with one decimal."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
