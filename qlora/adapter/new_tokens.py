"""The tokens that were added for an adapter: recorded with it, and added again wherever it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapter.folder import inside
from qlora.adapter.read import WEIGHTS_NAME, AdapterFile, open_adapter
from qlora.data.new_tokens import add_new_tokens, tokenizer_files
from qlora.distributed.collectives import whole_shape
from qlora.errors import AdapterError
from qlora.lora.expert_paths import module_at

# The key in the record beside the tensors.
RECORD = "new_tokens"
# On a model: what `load_base` added, or None; and by name what the adapters that were loaded record.
ADDED, KEPT = "qlora_new_tokens", "qlora_recorded_tokens"
# What transformers calls the files of a tokenizer.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


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


def files_beside(found: AdapterFile) -> dict[str, bytes]:
    """The tokenizer that lies beside an adapter with new tokens, by file name. Raises AdapterError for a link outside."""
    if RECORD not in found.described:
        return {}
    names = [name for name in TOKENIZER_FILES if (found.folder / name).exists()]
    return {name: inside(found.folder, name).read_bytes() for name in names}


def check_tokens(model: nn.Module, found: AdapterFile) -> None:
    """Raise AdapterError where an adapter was trained with other new tokens than the model has. Rank-local.

    What a model has that `load_base` did not load is not known; it needs rows enough.
    """
    theirs, ours = recorded_tokens(found), model.__dict__.get(ADDED)
    place, step = str(found.folder / WEIGHTS_NAME), _both_calls(str(found.folder))
    if theirs is None:
        at_the_same = {i for ids in found.token_rows.values() for i in ids} & set(ours.ids if ours is not None else ())
        if at_the_same and found.described.get("base"):
            raise AdapterError(
                "the adapter has rows of its own for ids that are new tokens in this model, and records no new tokens",
                place=place,
                found=sorted(at_the_same)[:5],
                next_step=step,
            )
    elif ADDED in model.__dict__ and (ours is None or (ours.tokens, ours.ids) != (theirs.tokens, theirs.ids)):
        raise AdapterError(
            "the adapter was trained with other new tokens than this model has",
            place=place,
            found=_listed(theirs),
            wanted=_listed(ours),
            next_step=step,
        )
    elif ADDED not in model.__dict__ and (num_rows := _num_rows(model)) is not None and num_rows < theirs.num_rows:
        raise AdapterError(
            "the model has no rows for the adapter's new tokens",
            place=place,
            found=f"{num_rows} rows",
            wanted=f"{theirs.num_rows} or more, for {_listed(theirs)}",
            next_step=step,
        )


def tokens_kept(model: nn.Module, found: AdapterFile) -> NewTokens | None:
    """What a loaded adapter is to be saved with again: its own record. Raises AdapterError.

    A file that says nothing of new tokens stays so, unless it holds something of the embedding or the head.
    """
    theirs = recorded_tokens(found)
    ours: NewTokens | None = model.__dict__.get(ADDED)
    if theirs is not None:
        return ours or replace(theirs, files=files_beside(found))
    sides = {id(side) for side in _sides(model)}
    return ours if any(id(module_at(model, key.path)) in sides for key in found.entries) else None


def tokens_of(model: nn.Module, name: str) -> NewTokens | None:
    """What an adapter of a model is saved with: its own record, else what was added to the base."""
    found: NewTokens | None = model.__dict__.get(KEPT, {}).get(name, model.__dict__.get(ADDED))
    return found


def _both_calls(folder: str) -> str:
    return f"call load_base(BASE, adapter={folder!r}) and then load_adapter(model, {folder!r})"


def _listed(new: NewTokens | None) -> str:
    if new is None:
        return "none"
    pairs = [f"{token!r} is {token_id}" for token, token_id in zip(new.tokens, new.ids, strict=True)]
    return ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")


def _sides(model: Any) -> list[nn.Module]:
    """The input embedding and the head, as far as the model names them."""
    gets = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    return [module for get in gets if callable(get) and (module := get()) is not None]


def _num_rows(model: nn.Module) -> int | None:
    weight = next((getattr(module, "weight", None) for module in _sides(model)), None)
    return None if weight is None else whole_shape(weight)[0]


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
