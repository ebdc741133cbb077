"""docs/failures.md names a test for each of its rows, and those tests are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.faults.test_changes import MAY_CHANGE, MAY_CHANGE_TOGETHER

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs/failures.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| what goes wrong")]


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_is_named_exists_and_runs(file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert name.startswith("test_")
    marks = " ".join(ast.unparse(mark) for mark in found.decorator_list)
    assert not re.search(r"\b(skip|xfail)\b", marks)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_a_test_and_nothing_else_in_its_last_column(row: str) -> None:
    last = row.strip().strip("|").split("|")[-1]
    names = [part.strip() for part in last.split(",")]
    assert names
    assert all(re.fullmatch(r"`[\w/]+\.py::test_\w+`", name) for name in names), last


def test_all_rows_were_found() -> None:
    assert len(ROWS) > 45
    assert len(NAMED) > 45


def test_the_keys_that_may_change_are_listed() -> None:
    for key in (*MAY_CHANGE, *MAY_CHANGE_TOGETHER):
        section = key.split(".")[0]
        assert f"`{key}`" in TEXT or (section in ("eval", "checkpoint", "logging") and f"`{section}`" in TEXT), key
