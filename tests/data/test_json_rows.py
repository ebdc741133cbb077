"""Strict reading of JSON Lines and JSON lists: Python's own `json` says what is right, crafted bytes what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.json_rows import decode_utf8, read_json_lines, read_json_list
from qlora.errors import DataError

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab\n"', max_size=3), inner, max_size=3),
    max_leaves=6,
)
_ROWS = st.lists(st.dictionaries(st.text("xyz", max_size=3), _VALUES, max_size=3), max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=_ROWS, ascii_only=st.booleans(), bom=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n  \n"]))
def test_lines_round_trip(tmp_path_factory, rows, ascii_only, bom, end) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    found = list(read_json_lines(path))
    assert [row for row, _ in found] == rows
    assert [line for _, line in found] == [1 + index * end.count("\n") for index in range(len(rows))]


@settings(max_examples=60, deadline=None)
@given(rows=_ROWS, indent=st.sampled_from([None, 0, 2]), bom=st.booleans())
def test_lists_round_trip_with_the_line_each_row_starts_on(tmp_path_factory, rows, indent, bom) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.json"
    text = json.dumps(rows, indent=indent)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    found = list(read_json_list(path))
    assert [row for row, _ in found] == rows
    lines = text.split("\n")
    for row, line in found:
        rest = "\n".join(lines[line - 1 :])
        start = rest.index("{")
        assert indent is None or start == len(rest) - len(rest.lstrip())
        if indent is not None:
            assert json.JSONDecoder().raw_decode(rest, start)[0] == row


def test_json_lines_under_the_name_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row for row, _ in read_json_list(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        ('{"a": 1', 8, "Expecting ','"),
        ('{"a": 1]', 8, "Expecting ','"),
        ('{"a": "b}', 7, "Unterminated string"),
        ("{'a': 1}", 2, "Expecting property name"),
        ('{"a": 1} {"b": 2}', 10, "Extra data"),
        ('{"a": "tab\there"}', 11, "Invalid control character"),
        ('{"a": NaN}', 1, "NaN is not JSON"),
        ('{"a": ' + "[" * 200_000, 1, "recursion"),
        ('{"a": ' + "1" * 5000 + "}", 1, "digits"),
    ],
)
def test_a_bad_line_is_named_with_its_column(tmp_path: Path, line: str, column: int, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 0}\n\n' + line + '\n{"a": 3}\n')
    with pytest.raises(DataError, match=reason) as caught:
        list(read_json_lines(path))
    assert caught.value.place == f"{path}:3:{column}"
    assert caught.value.found is not None


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('[{"a": 1},\n {"a": 2},\n]', "3:1", "Expecting value"),
        ('[{"a": 1}\n {"a": 2}]', "2:2", "expected ','"),
        ('[{"a": 1}', "1:10", "expected ','"),
        ('[\n{"a": ,}]', "2:7", "Expecting value"),
        ('[{"a": 1}]\n[]', "2:1", "nothing after"),
        ("[", "1:2", "Expecting value"),
        ('"text"', "1:1", "a list of objects"),
    ],
)
def test_a_bad_list_is_named_with_its_place(tmp_path: Path, text: str, place: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        list(read_json_list(path))
    assert caught.value.place == f"{path}:{place}"


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 59), byte=st.integers(0, 255))
def test_one_changed_byte_is_read_like_json_or_refused_with_its_line(tmp_path_factory, at: int, byte: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    good = b'{"text": "first \xc3\xa9"}\n{"text": [1, 2, {"x": null}]}\n{"text": "last"}\n'
    raw = good[:at] + bytes([byte]) + good[at + 1 :]
    path.write_bytes(raw)
    try:
        expected = [json.loads(line) for line in raw.decode().split("\n") if line.strip()]
        assert all(isinstance(row, dict) for row in expected)
        assert b"\0" not in raw
    except (ValueError, AssertionError):
        with pytest.raises(DataError) as caught:
            list(read_json_lines(path))
        # A byte turned into, or from, a line break moves the error to the line after.
        line = raw[:at].count(b"\n") + 1
        assert str(caught.value.place).startswith((f"{path}:{line}", f"{path}:{line + 1}"))
    else:
        assert [row for row, _ in read_json_lines(path)] == expected


@pytest.mark.parametrize("value", ["[1]", '"text"', "3", "null"])
def test_a_row_that_is_no_object_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 0}\n' + value + "\n")
    with pytest.raises(DataError, match="not a JSON object") as caught:
        list(read_json_lines(path))
    assert caught.value.place == f"{path}:2"


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n')
    rows = read_json_lines(path)
    assert next(rows)[0] == {"a": "😀"}
    with pytest.raises(DataError, match="surrogate"):
        next(rows)


def test_bytes_that_are_not_utf8_are_named_by_their_offset_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n'
    path.write_bytes(first + b'{"a": "caf\xe9"}\n')
    with pytest.raises(DataError, match=f"byte {len(first) + 10} is not UTF-8") as caught:
        list(read_json_lines(path))
    assert caught.value.place == f"{path}:2"
    assert "0xe9" in str(caught.value.found)


def test_a_nul_is_named_by_its_offset_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\0"}\n')
    with pytest.raises(DataError, match="byte 16 is NUL"):
        list(read_json_lines(path))


def test_utf16_is_refused_at_its_first_byte() -> None:
    with pytest.raises(DataError, match="byte 0 is not UTF-8"):
        decode_utf8('{"a": 1}'.encode("utf-16"), "file")
