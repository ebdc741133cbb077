"""Prompts out of files: one a line, or the field `prompt` of JSON Lines. Light: neither torch nor a tokenizer."""

from __future__ import annotations

from pathlib import Path

from qlora.data.json_rows import decode_utf8, read_json_lines
from qlora.errors import DataError


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, in its order; empty lines are skipped. Rank-local.

    Args:
        file: rows with a field `prompt` where it ends in .jsonl, plain text otherwise. Other fields are not looked at.

    Raises:
        DataError: a file that cannot be read or holds no prompt, or a row without one.
    """
    try:
        prompts = _read_rows(file) if file.suffix == ".jsonl" else _read_lines(file)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", place=str(file)) from error
    if not prompts:
        raise DataError("not one prompt", place=str(file), wanted="a prompt a line, or .jsonl rows with `prompt`")
    return prompts


def _read_lines(file: Path) -> list[str]:
    lines = decode_utf8(file.read_bytes(), str(file)).split("\n")
    return [stripped for line in lines if (stripped := line.strip())]


def _read_rows(file: Path) -> list[str]:
    prompts = []
    for row, line in read_json_lines(file):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                "a row without a prompt",
                place=f"{file}:{line}",
                found=f"fields {', '.join(row) or 'none'}" if prompt is None else repr(prompt)[:80],
                wanted='{"prompt": "..."}',
            )
        prompts.append(prompt)
    return prompts
