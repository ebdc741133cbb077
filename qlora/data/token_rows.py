"""Tokenizes rendered rows, tells targets from context token by token, and cuts rows that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qlora.data.chat import RenderedRow
from qlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenRow:
    """One document in tokens.

    Args:
        input_ids: token ids, at least one.
        is_target: for each token whether it is to be learned. The first never is: nothing comes before it.
        place: where the record stands.
    """

    input_ids: list[int]
    is_target: list[bool]
    place: str

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.is_target) or not self.input_ids:
            raise ValueError(f"{self.place}: {len(self.input_ids)} tokens with {len(self.is_target)} target flags")
        if self.is_target[0]:
            raise ValueError(f"{self.place}: the first token is a target")

    @property
    def has_target(self) -> bool:
        """Whether anything is to be learned from this row."""
        return any(self.is_target)


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[RenderedRow]) -> list[TokenRow | None]:
    """Tokenize rows together, which the fast tokenizers do on all cores. Rank-local.

    A token is a target where any character of it is in a target span, or where it stands inside one without characters of
    its own, as white space does in some tokenizers' offsets. Flags come from places, never from token ids, so that an
    end-of-turn token stays a target where it also serves as padding.

    Returns:
        A row of tokens for each row, None where there is not one token.

    Raises:
        DataError: the tokenizer has no offsets (it is not a fast one).
    """
    encoded: list[TokenRow | None] = [None] * len(rows)
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer cannot say which characters a token stands for",
            found=type(tokenizer).__name__,
            wanted="a fast tokenizer (tokenizer.json)",
            next_step="convert it: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)",
        )
    for add_special_tokens in (False, True):
        chosen = [index for index, row in enumerate(rows) if row.add_special_tokens == add_special_tokens]
        if not chosen:
            continue
        batch: Any = tokenizer(
            [rows[index].text for index in chosen],
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for index, input_ids, offsets in zip(chosen, batch["input_ids"], batch["offset_mapping"], strict=True):
            encoded[index] = _token_row(rows[index], list(input_ids), offsets, tokenizer.eos_token_id)
    return encoded


def cut_row(row: TokenRow, max_length: int, over_long: Literal["truncate", "split", "drop"]) -> list[TokenRow]:
    """Make a row fit into max_length tokens.

    Args:
        row: of any length.
        max_length: tokens.
        over_long: truncate keeps the first max_length tokens, split makes consecutive rows of max_length and a rest,
            drop keeps nothing. The first token of each part has nothing before it any more and is no target.
    """
    if len(row.input_ids) <= max_length:
        return [row]
    if over_long == "drop":
        return []
    starts = [0] if over_long == "truncate" else range(0, len(row.input_ids), max_length)
    return [
        TokenRow(
            row.input_ids[start : start + max_length],
            [False, *row.is_target[start + 1 : start + max_length]],
            row.place,
        )
        for start in starts
    ]


def _token_row(row: RenderedRow, input_ids: list[int], offsets: Any, eos_token_id: int | None) -> TokenRow | None:
    is_target = np.zeros(len(input_ids), dtype=bool)
    if input_ids:
        starts, stops = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        for first, past_last in row.target_spans:
            # White space at the very start may be said to be nowhere, (0, 0).
            is_target |= ((stops > first) | (first == 0)) & (starts < past_last)
    flags: list[bool] = is_target.tolist()
    if row.append_eos and eos_token_id is not None:
        if not input_ids or input_ids[-1] != eos_token_id:
            input_ids.append(eos_token_id)
            flags.append(True)
        flags[-1] = True
    if not input_ids:
        return None
    flags[0] = False
    return TokenRow(input_ids, flags, row.place)
