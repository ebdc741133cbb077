"""The pairs are clean, the same every time, and their split leaks nothing."""

from __future__ import annotations

import builtins
import cmath
import inspect
import math
import os.path
import subprocess
import sys

import pytest

from qlora.assets.docstrings import (
    MAX_SUMMARY_CHARS,
    Pair,
    comment_blocks,
    documented_names,
    make_pairs,
    source_files,
    split_pairs,
    summary_key,
    summary_of,
)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return make_pairs()


def test_pairs_are_one_clean_line_each(pairs: list[Pair]) -> None:
    assert len(pairs) > 2000  # enough for the quickstart on every supported Python
    assert [p.name for p in pairs] == sorted({p.name for p in pairs})
    for pair in pairs:
        assert pair.summary == " ".join(pair.summary.split())
        assert len(pair.summary) <= MAX_SUMMARY_CHARS
        assert pair.summary.endswith((".", "!", "?"))
        assert pair.summary.isascii()


def test_docstrings_are_those_python_itself_shows() -> None:
    found = documented_names()
    for name, member in {
        "math.cosh": math.cosh,
        "cmath.cosh": cmath.cosh,
        "os.path.join": os.path.join,
        "str.title": str.title,
        "len": builtins.len,
    }.items():
        assert inspect.cleandoc(found[name]) == inspect.getdoc(member)


def test_another_process_with_another_hash_seed_makes_the_same_split(pairs: list[Pair]) -> None:
    code = "from qlora.assets.docstrings import *; print(split_pairs(make_pairs(), 50, 20))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert outputs[0].stdout == outputs[1].stdout
    assert outputs[0].stdout.decode().strip() == str(split_pairs(pairs, 50, 20))


def test_split_shares_no_summary(pairs: list[Pair]) -> None:
    train, held_out = split_pairs(pairs, 800, 120)
    assert len(train) == 800
    assert len(held_out) == 120
    keys = [summary_key(p.summary) for p in train + held_out]
    assert len(set(keys)) == len(keys)


def test_twins_speak_with_one_voice() -> None:
    twins = [
        Pair("math.cosh", "Return the hyperbolic cosine of x."),
        Pair("cmath.cosh", "Return the hyperbolic cosine of z."),
        Pair("gc.collect", "Run the garbage collector."),
    ]
    train, held_out = split_pairs(twins, 1, 1)
    assert len({summary_key(p.summary) for p in train + held_out}) == 2
    with pytest.raises(ValueError, match="documents 2"):
        split_pairs(twins, 2, 1)


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Run the garbage\n    collector.  Then stop.", "Run the garbage collector."),
        ("B.find(sub[, start[, end]]) -> int\n\nReturn the lowest index in B.", "Return the lowest index in B."),
        ("f(x) -- compute the answer of x", "Compute the answer of x."),
        ("Work on numbers, e.g. Fractions and ints. More.", "Work on numbers, e.g. Fractions and ints."),
        ("Short.", None),
        ("The arguments of this function are:\n\n  a", None),
        ("Über alles andere hinaus.", None),
        ("x" * 300, None),
    ],
)
def test_summary_is_the_first_sentence(docstring: str, summary: str | None) -> None:
    assert summary_of(docstring) == summary


def test_a_pair_is_one_line_of_bounded_length() -> None:
    with pytest.raises(ValueError, match="not a pair"):
        Pair("a", "Two lines\nare not one line.")


def test_source_files_leave_out_what_is_not_the_library() -> None:
    modules = [name for name, _ in source_files()]
    assert modules == sorted(modules)
    assert "json.decoder" in modules
    assert not [m for m in modules if m.split(".")[0] in ("test", "idlelib", "site-packages", "antigravity", "this")]


def test_comment_blocks_are_runs_of_whole_lines() -> None:
    source = "x = 1  # not this\n# first line\n#  second line\ny = 2\n# too short\n"
    assert list(comment_blocks(source, min_chars=15)) == ["first line\nsecond line"]
