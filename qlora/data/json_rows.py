"""Reads JSON Lines and JSON lists strictly, so that a damaged file is an error with a place.

Libraries that read data sets tend to repair what they find: bad bytes are replaced, missing keys become null, an empty
file is no file. A run that trains for days on repaired rows is worse than one that does not start, so rows are parsed
here first: UTF-8 and nothing else, one JSON object a row, and errors that say `file:line:column`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SNIPPET_CHARACTERS = 40


def decode_utf8(raw: bytes, place: str, first_byte: int = 0) -> str:
    """Decode bytes of a file that must be UTF-8 text; a byte order mark at the start of the file is left out.

    Args:
        raw: the bytes.
        place: the file, or `file:line`, for the error.
        first_byte: where in the file `raw` starts; errors count bytes from the start of the file.

    Raises:
        DataError: a byte that is not UTF-8, or a NUL.
    """
    if first_byte == 0 and raw.startswith(_BOM):
        raw, first_byte = raw[len(_BOM) :], len(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {first_byte + error.start} is not UTF-8 ({error.reason})",
            place=place,
            found=f"0x{raw[error.start]:02x} in {raw[max(0, error.start - 20) : error.start + 20]!r}",
            wanted="text encoded as UTF-8",
            next_step="convert the file (iconv -f ENCODING -t UTF-8), or correct the damaged row",
        ) from None
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"byte {first_byte + nul} is NUL",
            place=place,
            found=f"0x00 in {raw[max(0, nul - 20) : nul + 20]!r}",
            wanted="text without NUL bytes",
            next_step="write the file again: NUL bytes usually mean UTF-16 or an interrupted copy",
        )
    return text


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (object, line number from 1) of a JSON Lines file, one line in memory at a time; empty lines are skipped.

    Raises:
        DataError: a line that is not UTF-8, not JSON or not an object, with `file:line:column`.
    """
    first_byte = 0
    with path.open("rb") as file:
        for line_number, raw in enumerate(file, start=1):
            text = decode_utf8(raw, f"{path}:{line_number}", first_byte).rstrip("\r\n")
            first_byte += len(raw)
            if not text.strip():
                continue
            try:
                value = json.loads(text, parse_constant=_refuse_constant)
            except json.JSONDecodeError as error:
                raise _not_json(path, text, error.pos, line_number, error.pos, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise _not_json(path, text, 0, line_number, 0, str(error)) from None
            yield _checked_object(value, text, f"{path}:{line_number}"), line_number


def read_json_list(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (object, line number where it starts) of a JSON file that holds a list of objects.

    The text of the whole file is in memory, its rows one at a time. A file whose first character is `{` is read as
    JSON Lines, which are often named `.json` too.

    Raises:
        DataError: text that is not UTF-8, not JSON or not a list of objects, with `file:line:column`.
    """
    text = decode_utf8(path.read_bytes(), str(path))
    position = _skip_space(text, 0)
    if position == len(text):
        return
    if text[position] == "{":
        yield from read_json_lines(path)
        return
    if text[position] != "[":
        raise _not_json(path, text, position, *_line_and_column(text, position), "expected a list of objects")
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    position = _skip_space(text, position + 1)
    line, counted_to = 1, 0
    wants_row = False
    while wants_row or text[position : position + 1] != "]":
        line += text.count("\n", counted_to, position)
        counted_to = position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _not_json(path, text, error.pos, error.lineno, error.colno - 1, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _not_json(path, text, position, *_line_and_column(text, position), str(error)) from None
        yield _checked_object(value, text[position:end], f"{path}:{line}"), line
        position = _skip_space(text, end)
        wants_row = text[position : position + 1] == ","
        if wants_row:
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise _not_json(path, text, position, *_line_and_column(text, position), "expected ',' or the list's end ']'")
    position = _skip_space(text, position + 1)
    if position != len(text):
        raise _not_json(path, text, position, *_line_and_column(text, position), "expected nothing after the list")


def _checked_object(value: Any, text: str, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            "a row is not a JSON object",
            place=place,
            found=f"{type(value).__name__}: {text[:_SNIPPET_CHARACTERS]}",
            wanted='an object with named fields, such as {"messages": [...]}',
        )
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            # Half of a surrogate pair is legal JSON, but no tokenizer takes it: better here than without a place there.
            raise DataError(
                "a \\u escape is half of a surrogate pair, which is no character",
                place=place,
                found=f"\\u{ord(error.object[error.start]):04x}",
                wanted="both halves, or the character itself",
            ) from None
    return value


def _not_json(path: Path, text: str, position: int, line: int, characters_before: int, reason: str) -> DataError:
    start = max(0, position - _SNIPPET_CHARACTERS)
    before, after = text[start:position], text[position : position + _SNIPPET_CHARACTERS]
    return DataError(
        f"not JSON: {reason}",
        place=f"{path}:{line}:{characters_before + 1}",
        found=f"{before!r} and then {after!r}" if after else f"{before!r} and then nothing",
        wanted="one JSON object a line (.jsonl), or a list of objects (.json)",
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    line_start = text.rfind("\n", 0, position) + 1
    return text.count("\n", 0, position) + 1, position - line_start
