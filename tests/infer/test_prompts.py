"""Prompts out of files, and what `qlora generate` does with several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.cli.main import main
from qlora.errors import DataError
from qlora.infer.prompts import read_prompts


def test_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffwhat\r\n\n  is this?  \nünd\u2028das".encode())
    assert read_prompts(file) == ["what", "is this?", "ünd\u2028das"]


def test_rows_with_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two\\nlines", "completion": "x"}\n\n{"prompt": " b "}\n')
    assert read_prompts(file) == ["two\nlines", " b "]


@pytest.mark.parametrize(
    ("name", "content", "place", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl:2", "fields text"),
        ("p.jsonl", '{"prompt": ""}\n', "p.jsonl:1", "without a prompt"),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl:1", "found: 3"),
        ("p.jsonl", "{}\n", "p.jsonl:1", "fields none"),
        ("p.jsonl", '{"prompt": \n', "p.jsonl:1", "not JSON"),
        ("p.txt", "\n \n", "p.txt", "not one prompt"),
        ("p.txt", b"a\n\xff", "p.txt", "not UTF-8"),
        ("p.jsonl", "", "p.jsonl", "not one prompt"),
        ("no.txt", None, "no.txt", "No such file"),
    ],
)
def test_what_is_no_prompt_is_named(
    tmp_path: Path, name: str, content: str | bytes | None, place: str, message: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as raised:
        read_prompts(file)
    assert place in str(raised.value)


def test_several_prompts_are_answered_in_their_order(
    random_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.txt").write_text("x\n")
    argv = ["generate", "--base", str(random_base), "--max-new-tokens", "6"]
    both = [*argv, "--prompt", "what is\nthis", "--prompts", str(tmp_path / "more.txt")]
    out = tmp_path / "answers.jsonl"
    assert main([*both, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"2 answers: {out}\n"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["what is\nthis", "x"]
    assert main(both) == 0
    first, second = (row["answer"] for row in rows)
    assert first != second
    assert capsys.readouterr().out == f"> what is\n> this\n{first}\n\n> x\n{second}\n\n"

    assert main([*both, "--out", str(out)]) == 2
    assert "would overwrite what is there" in capsys.readouterr().err
    assert main([*both, "--out", str(tmp_path / "no/answers.jsonl")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_no_prompt_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate"]) == 2
    assert "give --prompt TEXT or --prompts FILE" in capsys.readouterr().err
