"""Adding tokens to a tokenizer: the same ids every time, from the base's own tokenizer and the list alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add tokens behind those that a tokenizer has, in the order given. Rank-local. Returns their ids.

    They are no special tokens: an answer shows them.

    Raises:
        ConfigError: a token is there already, given twice, or not read as one token. Nothing is added then, but for the
            last of these.
    """
    known = tokenizer.get_vocab()
    for index, token in enumerate(tokens):
        if token in known or token in tokens[:index]:
            why = "is given twice" if token not in known else "is in the tokenizer already"
            raise ConfigError(
                f"the token {token!r} {why}",
                place="lora.new_tokens",
                found=f"id {known[token]}" if token in known else None,
                next_step=f"train its row with lora.trainable_token_indices: [{known[token]}]" if token in known else None,
            )
    if tokens:
        tokenizer.add_tokens(list(tokens))
    known = tokenizer.get_vocab()
    ids = tuple(known.get(token, -1) for token in tokens)
    for token, token_id in zip(tokens, ids, strict=True):
        read: object = tokenizer(token, add_special_tokens=False)["input_ids"]
        if read != [token_id]:
            raise ConfigError(
                f"the tokenizer does not read {token!r} as one token",
                place="lora.new_tokens",
                found=read,
                wanted="one id",
                next_step="choose a token that is no part of another one and has no spaces around it",
            )
    return ids


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """What a folder of this tokenizer holds, by file name."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}
