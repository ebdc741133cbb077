"""Opening a base with its tokenizer: what `qlora.load_base` is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora.adapter.new_tokens import add_tokens, tokens_to_add
from qlora.adapter.read import open_adapter
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.data.tokenizer import check_vocabulary, load_tokenizer
from qlora.distributed.collectives import whole_shape
from qlora.distributed.sharding import Sharding
from qlora.lora.from_weights import FromWeights
from qlora.lora.starts import needs_weights
from qlora.quant.load import load_model
from qlora.quant.residual import InitialFactors, Method
from qlora.quant.source import read_merged, resolve_base

DEFAULT_QUANTIZATION = QuantizationConfig()


def load_base(
    base: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "bfloat16",
    quantization: QuantizationConfig | None = DEFAULT_QUANTIZATION,
    device: torch.device | str | None = None,
    attention: str = "auto",
    allow_pickle: bool = False,
    sharding: Sharding | None = None,
    check_room: bool = True,
    progress: Callable[[int, int], None] | None = None,
    lora: LoraConfig | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Load a frozen base, quantized while it is read, and its tokenizer. Rank-local, or with a sharding a collective.

    Args:
        base: `builtin:tiny`, a Hugging Face folder, or a hub id.
        dtype: of unquantized weights, and what quantized layers compute in.
        quantization: None leaves the base as it is. What `qlora merge` wrote in 16 bits is warned of otherwise.
        device: None is the current GPU, or the CPU.
        sharding: how ranks share one copy (`Runtime.sharding`); None keeps a whole one.
        check_room: refuse a base that the free memory does not hold.
        lora: what will be injected. Where it starts from the base's weights (PiSSA, OLoRA, LoftQ), these are decomposed
            while they are read, and `inject_lora` with the same config starts from what was found. Its new tokens
            are added, and the base gets rows for them where it has none.
        seed: of what is drawn at random for that.
        adapter: the folder of an adapter that will be loaded, or trained on. Where it started from the base's weights, the
            base is rebuilt as that adapter's is, and so are its new tokens, whatever `lora` says.
        tokenizer: the base's own, on every rank, where it is open already. A large one takes most of a second to read.

    Returns:
        The transformers model, in eval mode with its forward unchanged, and the tokenizer.

    Raises:
        ConfigError: `lora` starts from the base's weights, and this base or one of the targeted layers cannot do that.
        AdapterError: see `adapter.read.open_adapter`.
        BaseModelError: see `quant.source.resolve_base`, `quant.load.load_model`; also a tokenizer with more tokens than
            the embedding has rows.
    """
    sharding = sharding or Sharding()
    source = sharding.together(partial(resolve_base, base, revision, allow_pickle=allow_pickle))
    if quantization is not None and sharding.together(partial(read_merged, source.folder)) is not None:
        _warn_of_merged(base)
    if tokenizer is None:
        tokenizer = sharding.together(partial(load_tokenizer, str(source.folder)))
    asked = lora.new_tokens if lora is not None else ()
    new = sharding.together(lambda: add_tokens(tokenizer, tokens_to_add(adapter, asked)))
    recorded = sharding.together(partial(_recorded, adapter)) if adapter is not None else None
    wanted: Method | InitialFactors | None = recorded
    if adapter is None and lora is not None and needs_weights(lora):
        wanted = FromWeights(lora, seed)
    model = load_model(
        source, dtype=dtype, quantization=quantization, device=device, attention=attention, sharding=sharding,
        check_room=check_room, progress=progress, initial=wanted, num_rows=new.num_rows if new is not None else None,
    )  # fmt: skip
    model.qlora_new_tokens = new
    check_vocabulary(tokenizer, whole_shape(model.get_input_embeddings().weight)[0])
    return model, tokenizer


def _warn_of_merged(base: str) -> None:
    """Say once, on the main rank, what quantizing does to a merged model."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {base} is a merged model, and quantizing it rounds away much of what its adapter learned; "
            "open it with model.quantization: null (in Python quantization=None)",
            file=sys.stderr,
            flush=True,
        )


def _recorded(folder: str | Path) -> InitialFactors | None:
    """The factors that an adapter started from, where they were found from the base's weights. Rank-local."""
    found = open_adapter(folder)
    return found.initial.read() if found.initial is not None else None
