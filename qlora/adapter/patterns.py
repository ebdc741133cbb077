"""Regular expressions in an adapter's config, which may come from anywhere: none may take for ever. Torch-free.

Python's matching goes back and tries again, so that a repetition of something that can be repeated in several ways takes
time exponential in the length of a path: `(a+)+$`. Names of modules need nothing of the kind, and are refused with it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora.errors import AdapterError

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

MOST_REPETITIONS = 6  # of any number of times, one behind another; each is another power of a path's length
MOST_CHARACTERS = 100_000  # a list of all experts of a model has some thousands
_REPEATS = frozenset("*+?{")


def refuse_slow(patterns: Iterable[str], key: str, path: Path) -> None:
    """Raise AdapterError where one of these could take for ever. What is no expression at all is left to others.

    Args:
        key: of the config file at `path`.
    """
    for pattern in patterns:
        reason = "is too long" if len(pattern) > MOST_CHARACTERS else _reason(pattern)
        if reason is not None:
            raise AdapterError(
                f"{key} holds a regular expression that {reason}",
                place=str(path),
                found=repr(pattern if len(pattern) < 80 else pattern[:77] + "..."),
                next_step="name the modules, or write it without a repetition inside a repetition",
            )


def texts_in(value: Any) -> list[str]:
    """The texts of a config's value, of whatever kind: itself, the entries of a list, the keys of a table."""
    if not isinstance(value, str | list | dict):
        return []
    return [text for text in ([value] if isinstance(value, str) else value) if isinstance(text, str)]


def _reason(pattern: str) -> str | None:
    if _REPEATS.isdisjoint(pattern):
        return None
    try:
        found = list(_repetitions(parser.parse(pattern), inside=False))
    except (re.error, RecursionError, OverflowError):
        return None
    if any(is_nested for is_nested in found):
        return "repeats what it may repeat in several ways"
    return f"repeats in {len(found)} places, of at most {MOST_REPETITIONS}" if len(found) > MOST_REPETITIONS else None


def _repetitions(parsed: Any, *, inside: bool) -> Iterator[bool]:
    """Of everything that may be repeated: whether that is inside something repeated, or has alternatives there."""
    for operator, argument in parsed:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            if most != least and (inside or most > 1):
                yield inside
            yield from _repetitions(body, inside=inside or most > 1)
        elif name == "BRANCH":
            if inside:
                yield True
            for branch in argument[1]:
                yield from _repetitions(branch, inside=inside)
        else:
            for part in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(part, parser.SubPattern):
                    yield from _repetitions(part, inside=inside)
