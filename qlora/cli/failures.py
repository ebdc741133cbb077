"""How an error looks on a terminal, in a log file and on one rank of many."""

from __future__ import annotations

import os
import re
import sys
import traceback
from typing import Annotated

import typer

from qlora.errors import QloraError
from qlora.secrets import redact

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def print_error(error: QloraError, *, with_traceback: bool = False) -> None:
    """Print an error on standard error; the word `error:` is red on a terminal, the text is never wrapped.

    Every rank of a launched job prints; those above 0 keep to one line, unless it is an error of that rank alone.
    """
    if with_traceback:
        print_traceback()
    text = printable(redact(str(error)))
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not error.of_one_rank:
        text = text.splitlines()[0]
    label = "error:" if rank == "0" else f"error (rank {rank}):"
    if _colored():
        label = f"\x1b[1;31m{label}\x1b[0m"
    _write(f"{label} {text}\n")


def print_traceback() -> None:
    """Print the traceback of the exception being handled, without secrets."""
    _write(redact(traceback.format_exc()))


def printable(text: str) -> str:
    """Return the text with control characters spelled out, so that a file's content cannot drive the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _colored() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:  # nobody reads standard error any more; the exit code still tells
        return
