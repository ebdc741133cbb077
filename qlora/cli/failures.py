"""How an error looks on a terminal, in a log file and on one rank of many."""

from __future__ import annotations

import os
import re
import sys
import traceback
from typing import Annotated

import typer

from qlora.errors import QloraError

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_TOKEN",
    "WANDB_API_KEY",
    "COMET_API_KEY",
    "CLEARML_API_SECRET_KEY",
    "SWANLAB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SHORTEST_SECRET = 8  # a shorter value would hide ordinary words


def print_error(error: QloraError, *, with_traceback: bool = False) -> None:
    """Print an error on standard error; the word `error:` is red on a terminal, the text is never wrapped.

    Every rank of a launched job prints; those above 0 keep to one line, since most often all of them say the same.
    """
    if with_traceback:
        print_traceback()
    text = printable(redact(str(error)))
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        text = text.splitlines()[0]
    label = "error:" if rank == "0" else f"error (rank {rank}):"
    if _colored():
        label = f"\x1b[1;31m{label}\x1b[0m"
    _write(f"{label} {text}\n")


def print_traceback() -> None:
    """Print the traceback of the exception being handled, without secrets."""
    _write(redact(traceback.format_exc()))


def redact(text: str) -> str:
    """Return the text with every token of the environment, and whatever looks like a hub token, replaced by ***."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("***", text)


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
