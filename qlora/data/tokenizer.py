"""Loads a tokenizer without running code from its folder, and checks it against the base before any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_NAMED = 5


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub; code that comes with it is never run. Rank-local.

    A tokenizer without a padding token gets its end-of-sequence token for that, so that no token is added which the
    base has no embedding for. What is padding is told by masks and never by the token's id, so the end-of-sequence
    token stays something to learn.

    Args:
        path: a folder, or a hub id.
        revision: a hub revision.

    Raises:
        BaseModelError: no usable tokenizer is there.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # missing files, damaged JSON, unknown classes and refused code all end here
        folder = Path(path)
        if folder.is_dir():
            found = "files " + (", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "none")
        else:
            found = "no such folder here"
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BaseModelError(
            f"the tokenizer cannot be loaded ({type(error).__name__}: {reason})",
            place=path,
            found=found,
            wanted="tokenizer.json and tokenizer_config.json",
            next_step="copy the tokenizer's files next to the model's, or name a base that has them",
        ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill masked places with: the padding token's, else the end-of-sequence token's, else 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embedding_rows: int) -> None:
    """Refuse a tokenizer that can produce ids the base has no embedding for.

    Args:
        tokenizer: added tokens included.
        num_embedding_rows: rows of the base's input embedding.

    Raises:
        BaseModelError: naming the tokens beyond it.
    """
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= num_embedding_rows)
    if not beyond:
        return
    named = ", ".join(f"{token!r} = {token_id}" for token_id, token in beyond[:_NUM_NAMED])
    more = f" and {len(beyond) - _NUM_NAMED} more" if len(beyond) > _NUM_NAMED else ""
    raise BaseModelError(
        "the tokenizer has tokens that the base has no embedding for",
        place=str(tokenizer.name_or_path) or None,
        found=named + more,
        wanted=f"ids below {num_embedding_rows}, the rows of the embedding",
        next_step="use the tokenizer that the base was trained with, or remove the added tokens",
    )
