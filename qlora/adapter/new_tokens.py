"""The tokens that were added for an adapter: recorded with it, and added again wherever it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.adapter.read import WEIGHTS_NAME, AdapterFile, open_adapter
from qlora.data.new_tokens import add_new_tokens, tokenizer_files
from qlora.errors import AdapterError

# The key in the record beside the tensors.
RECORD = "new_tokens"


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a base's tokenizer did not have.

    Attributes:
        tokens, ids: in the order in which they were added.
        files: of the tokenizer that has them, which are kept beside the adapter for other readers.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """Rows that an embedding has at least."""
        return max(self.ids) + 1

    def describe(self) -> dict[str, Any]:
        """The record beside an adapter's tensors."""
        return {"tokens": list(self.tokens), "ids": list(self.ids)}


def recorded_tokens(found: AdapterFile) -> NewTokens | None:
    """The tokens that were added for an adapter, or None. Raises AdapterError where the record is damaged."""
    record = found.described.get(RECORD)
    if record is None:
        return None
    tokens, ids = (record.get(key) if isinstance(record, dict) else None for key in ("tokens", "ids"))
    texts = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    numbers = isinstance(ids, list) and all(type(number) is int and number >= 0 for number in ids)
    if not texts or not numbers or len(tokens) != len(ids) or not tokens:  # type: ignore[arg-type]
        raise AdapterError("damaged metadata: new_tokens", place=str(found.folder / WEIGHTS_NAME), found=str(record)[:200])
    return NewTokens(tuple(tokens), tuple(ids))  # type: ignore[arg-type]


def tokens_to_add(adapter: str | Path | None, asked: Sequence[str]) -> NewTokens | Sequence[str]:
    """What is to be added: what an adapter records, else what is asked for. Rank-local. Raises AdapterError."""
    if adapter is None:
        return asked
    return recorded_tokens(open_adapter(adapter)) or asked


def add_tokens(tokenizer: Any, wanted: NewTokens | Sequence[str]) -> NewTokens | None:
    """Add tokens to a base's tokenizer; None where there are none to add. Rank-local.

    Raises:
        ConfigError: see `data.new_tokens.add_new_tokens`.
        AdapterError: they get other ids than they had in training: the tokenizer is another one.
    """
    tokens = wanted.tokens if isinstance(wanted, NewTokens) else tuple(wanted)
    if not tokens:
        return None
    ids = add_new_tokens(tokenizer, tokens)
    if isinstance(wanted, NewTokens) and ids != wanted.ids:
        raise AdapterError(
            "the base's tokenizer gives the adapter's new tokens other ids than in training",
            found=ids,
            wanted=wanted.ids,
            next_step="use the base with the tokenizer that the adapter was trained with",
        )
    return NewTokens(tokens, ids, tokenizer_files(tokenizer))
