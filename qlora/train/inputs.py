"""What a run is made of before there is a model: the base found, the data tokenized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from qlora.config.schema import JobConfig
from qlora.data.new_tokens import add_new_tokens
from qlora.data.prepare import prepare as tokenize
from qlora.data.token_store import TokenizedDataset
from qlora.data.tokenizer import load_tokenizer, padding_token_id
from qlora.errors import QloraError
from qlora.quant.source import BaseSource, resolve_base


@dataclass(frozen=True)
class Data:
    """What a run learns from and is evaluated on."""

    rows: TokenizedDataset
    eval_rows: TokenizedDataset | None
    pad_token_id: int
    tokenizer: Any


def open_inputs(config: JobConfig) -> Callable[[], tuple[BaseSource, Data]]:
    """Find the base and tokenize the data. Rank-local, before the ranks meet, so that no collective waits for it.

    Returns:
        what gives the base and the data, or raises the QloraError that came up. It is raised when the other ranks can be
        told: those of another node would wait half an hour for one that is gone.
    """
    try:
        source = resolve_base(config.model.base, config.model.revision, allow_pickle=config.model.allow_pickle)
        tokenizer = load_tokenizer(str(source.folder))
        add_new_tokens(tokenizer, config.lora.new_tokens)
        rows = tokenize(config.data.train, tokenizer, config.data)
        eval_rows = tokenize(config.data.eval, tokenizer, config.data) if config.data.eval else None
    except QloraError as error:
        found = error

        def fail() -> NoReturn:
            raise found

        return fail
    opened = source, Data(rows, eval_rows, padding_token_id(tokenizer), tokenizer)
    return lambda: opened
