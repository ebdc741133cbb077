"""Attention inside documents: packed rows hold several documents, and none of them sees another.

No T x T mask is ever made. On a CPU scores are made in tiles (`attention_cpu.py`), on a GPU one kernel takes the packed row
(`attention_gpu.py`), and where there is none the row is cut into groups of documents (`attention_segments.py`).

The function is registered with transformers' attention interface under the name `documents`; no model is patched. The
boundaries reach it as the keyword argument `document_layout`, which transformers' models hand down to their attention
layers. A model that drops it is noticed at the first forward pass and refused, so that documents can never leak.

Shapes: B batch (1 for packed rows), H heads, T tokens of a row, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from qlora.errors import ConfigError
from qlora.ops import attention_gpu
from qlora.ops.attention_cpu import attention_on_cpu
from qlora.ops.attention_segments import segmented_attention
from qlora.ops.documents import DocumentLayout

NAME = "documents"
_inside_packed_forward: ContextVar[bool] = ContextVar("_inside_packed_forward", default=False)


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    scaling: float,
    sliding_window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of each token over its own document. Rank-local.

    Args:
        query: (1, H, T, d); key, value: (1, Hkv, T, d) with H a multiple of Hkv.
        scaling: factor of the scores.
        sliding_window: a token sees this many tokens, itself included; None for all before it.

    Returns:
        (1, H, T, d).
    """
    if query.device.type == "cpu" and not dropout:
        return attention_on_cpu(query, key, value, layout, scaling, sliding_window)
    widths, grouped = (key.shape[-1], value.shape[-1]), query.shape[1] != key.shape[1]
    kernel = None if dropout else attention_gpu.choose(query.device, query.dtype, widths, grouped).kernel
    if kernel is not None:
        q_THd, k_TKd, v_TKe = (t[0].transpose(0, 1) for t in (query, key, value))
        return kernel(q_THd, k_TKd, v_TKe, layout, scaling, sliding_window).unsqueeze(0).transpose(1, 2)
    return segmented_attention(query, key, value, layout, scaling, sliding_window, dropout)


def describe(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], grouped: bool) -> str:
    """What computes attention per document there, and why. Arguments as in `attention_gpu.choose`. Rank-local."""
    if device.type == "cpu":
        return "tiles of scores, made again in backward"
    choice = attention_gpu.choose(device, dtype, widths, grouped)
    return f"{choice.name} ({choice.reason})"


@contextmanager
def packed_forward() -> Iterator[None]:
    """Mark a forward pass over a packed row: no mask is made, and a layer that gets no boundaries is an error."""
    token = _inside_packed_forward.set(True)
    try:
        yield
    finally:
        _inside_packed_forward.reset(token)


def register_documents_attention() -> str:
    """Make `documents` known to transformers' attention and mask interfaces. Returns the name. Safe to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa's mask outside of a packed forward pass, so that generation works as usual.

    Inside, there is none; but some models say how far a layer sees by its mask alone, so the size of a sliding window is
    handed to the layer in the mask's place.
    """
    from transformers.masking_utils import sdpa_mask

    if not _inside_packed_forward.get():
        return sdpa_mask(*args, **kwargs)
    window = kwargs.get("local_size")
    return None if window is None else torch.full((1, 1, 1, 1), int(window))


def _window_of(attention_mask: Tensor | None, sliding_window: int | None, module: torch.nn.Module) -> int | None:
    """The sliding window that `_mask` put in the mask's place, or that the layer was given by name."""
    if attention_mask is None:
        return sliding_window
    if attention_mask.numel() != 1 or attention_mask.dtype != torch.int64:
        raise ConfigError(
            f"{type(module).__name__} makes a mask of its own, which attention per document does not apply",
            next_step="set model.attention to eager",
        )
    return int(attention_mask)


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_layout: DocumentLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q, k, v (B, H, T, d) to (B, T, H, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if document_layout is None:
        if _inside_packed_forward.get():
            raise ConfigError(
                f"{type(module).__name__} gets no document boundaries from its model, so packed documents would leak",
                next_step="set model.attention to sdpa, or data.packing to false",
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"{type(module).__name__} needs `{name}`, which attention per document does not compute",
                next_step="set model.attention to eager",
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = _window_of(attention_mask, kwargs.get("sliding_window"), module)
    out = document_attention(query, key, value, document_layout, scale, window, dropout)
    return out.transpose(1, 2).contiguous(), None
