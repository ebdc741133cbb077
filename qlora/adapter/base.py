"""Opening a base with its tokenizer: what `qlora.load_base` is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qlora.config.schema import QuantizationConfig
from qlora.data.tokenizer import check_vocabulary, load_tokenizer
from qlora.distributed.collectives import whole_shape
from qlora.distributed.sharding import Sharding
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

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
) -> tuple[Any, Any]:
    """Load a frozen base, quantized while it is read, and its tokenizer. Rank-local, or with a sharding a collective.

    Args:
        base: `builtin:tiny`, a Hugging Face folder, or a hub id.
        dtype: of unquantized weights and of 4-bit arithmetic.
        quantization: None leaves the base as it is.
        device: None is the current GPU, or the CPU.
        sharding: how ranks share one copy (`Runtime.sharding`); None keeps a whole one.
        check_room: refuse a base that the free memory does not hold.

    Returns:
        The transformers model, in eval mode with its forward unchanged, and the tokenizer.

    Raises:
        BaseModelError: see `quant.source.resolve_base`, `quant.load.load_model`; also a tokenizer with more tokens than
            the embedding has rows.
    """
    sharding = sharding or Sharding()
    source = sharding.together(partial(resolve_base, base, revision, allow_pickle=allow_pickle))
    tokenizer = sharding.together(partial(load_tokenizer, str(source.folder)))
    model = load_model(
        source, dtype=dtype, quantization=quantization, device=device, attention=attention, sharding=sharding,
        check_room=check_room, progress=progress,
    )  # fmt: skip
    check_vocabulary(tokenizer, whole_shape(model.get_input_embeddings().weight)[0])
    return model, tokenizer
