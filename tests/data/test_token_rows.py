"""Tokenizing and cutting rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data.chat import RenderedRow
from qlora.data.token_rows import TokenRow, cut_row, encode_rows
from qlora.errors import DataError


def test_rows_keep_their_order_whether_or_not_special_tokens_are_added(make_tokenizer) -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    rows = [
        RenderedRow(str(number), (), "here", add_special_tokens=number % 3 == 0, append_eos=number % 2 == 0)
        for number in range(12)
    ]
    for number, row in enumerate(encode_rows(tokenizer, rows)):
        assert row is not None
        bos, eos = "<s>" if number % 3 == 0 else "", "</s>" if number % 2 == 0 else ""
        assert tokenizer.decode(row.input_ids) == f"{bos}{number}{eos}"


def test_a_row_without_a_token_is_none(make_tokenizer) -> None:
    rows = [RenderedRow("", (), "here", False, append_eos=False), RenderedRow("", (), "here", False, append_eos=True)]
    nothing, end = encode_rows(make_tokenizer(None), rows)
    assert nothing is None
    assert end is not None
    assert not end.has_target


def test_a_token_across_the_edge_of_a_span_is_a_target(make_tokenizer) -> None:
    tokenizer = make_tokenizer(None)
    text = "the question"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = encode_rows(tokenizer, [RenderedRow(text, ((len(text) - 1, len(text)),), "here", False, False)])[0]
    assert row is not None
    assert row.is_target == [False] * (len(tokens) - 1) + [True]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="cannot say which characters"):
        encode_rows(Slow(), [])  # type: ignore[arg-type]


@given(
    flags=st.lists(st.booleans(), min_size=1, max_size=40),
    max_length=st.integers(1, 12),
    over_long=st.sampled_from(["truncate", "split", "drop"]),
)
def test_cutting_keeps_tokens_and_flags_together(flags: list[bool], max_length: int, over_long) -> None:
    row = TokenRow(list(range(len(flags))), [False, *flags[1:]], "here")
    parts = cut_row(row, max_length, over_long)
    assert all(len(part.input_ids) <= max_length for part in parts)
    for part in parts:
        for place, (token, flag) in enumerate(zip(part.input_ids, part.is_target, strict=True)):
            assert flag == (row.is_target[token] and place > 0)
    together = [token for part in parts for token in part.input_ids]
    if len(flags) <= max_length:
        assert parts == [row]
    elif over_long == "truncate":
        assert together == row.input_ids[:max_length]
    elif over_long == "split":
        assert together == row.input_ids
        assert all(len(part.input_ids) == max_length for part in parts[:-1])
    else:
        assert parts == []


@pytest.mark.parametrize(("input_ids", "is_target"), [([], []), ([1], [True]), ([1, 2], [False])])
def test_a_row_checks_itself(input_ids: list[int], is_target: list[bool]) -> None:
    with pytest.raises(ValueError, match="here"):
        TokenRow(input_ids, is_target, "here")
