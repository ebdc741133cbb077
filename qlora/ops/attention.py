"""Attention inside documents: packed rows hold several documents, and none of them sees another.

A packed row is cut at its document boundaries before attention, so that no T x T mask is ever made. Documents of like
length are computed in one call: causal attention needs no mask for padding on the right, because a padded key comes
after every real query.

The function is registered with transformers' attention interface under the name `documents`; no model is patched. The
boundaries reach it as the keyword argument `document_layout`, which transformers' models hand down to their attention
layers. A model that drops it is noticed at the first forward pass and refused, so that documents can never leak.

Shapes: B batch (1 for packed rows), H heads, T tokens of a row, n documents of a group, L their padded length, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.errors import ConfigError

NAME = "documents"
# Documents are computed together while padding them costs less than starting another kernel: up to a quarter more
# tokens, and always within the same multiple of 16.
GROUP_RATIO = 1.25
GROUP_STEP = 16
# On CPUs torch's fused attention is made for long rows: up to about this length, scores made whole take a fifth to a half
# of its time, forward and backward.
SHORT = 192

_inside_packed_forward: ContextVar[bool] = ContextVar("_inside_packed_forward", default=False)


@dataclass(frozen=True)
class DocumentGroup:
    """Documents computed in one call. `rows_nL` holds each token's place in the row; padding repeats place 0."""

    rows_nL: Tensor | None  # None: the single document [start, start + length)
    start: int
    length: int


@dataclass(frozen=True)
class DocumentLayout:
    """Where the documents of one packed row lie, and in which groups they are computed.

    Attributes:
        lengths: tokens of each document, in the row's order; their sum is the row's length T.
        groups: of like length.
        order_T: for each token of the row, its place in the groups' concatenated outputs; None where that is the identity.
    """

    lengths: tuple[int, ...]
    groups: tuple[DocumentGroup, ...]
    order_T: Tensor | None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> DocumentLayout:
        """Build the layout of a row. Raises ValueError where a document is empty."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a packed row needs documents of at least one token, got lengths {tuple(lengths)}")
        if len(lengths) == 1:
            return cls((int(lengths[0]),), (DocumentGroup(None, 0, int(lengths[0])),), None)
        starts = [0]
        for length in lengths[:-1]:
            starts.append(starts[-1] + length)
        by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
        groups: list[DocumentGroup] = []
        order = torch.empty(sum(lengths), dtype=torch.int64)
        offset = 0
        while by_length:
            limit = max(lengths[by_length[0]] * GROUP_RATIO, -(-lengths[by_length[0]] // GROUP_STEP) * GROUP_STEP)
            members = [i for i in by_length if lengths[i] <= limit]
            by_length = by_length[len(members) :]
            longest = lengths[members[-1]]
            if len(members) == 1:
                groups.append(DocumentGroup(None, starts[members[0]], longest))
            else:
                places = torch.arange(longest)
                rows = torch.zeros(len(members), longest, dtype=torch.int64)
                for row, i in enumerate(members):
                    rows[row, : lengths[i]] = starts[i] + places[: lengths[i]]
                groups.append(DocumentGroup(rows.to(device), 0, longest))
            for i in members:
                order[starts[i] : starts[i] + lengths[i]] = torch.arange(offset, offset + lengths[i])
                offset += longest
        return cls(tuple(int(n) for n in lengths), tuple(groups), order.to(device))


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
    outputs = []
    for group in layout.groups:
        if group.rows_nL is None:
            places = slice(group.start, group.start + group.length)
            q, k, v = (t[:, :, places] for t in (query, key, value))
        else:
            n, longest = group.rows_nL.shape
            flat = group.rows_nL.reshape(-1)
            q, k, v = (t[0].index_select(1, flat).unflatten(1, (n, longest)).transpose(0, 1) for t in (query, key, value))
        visible = None
        if sliding_window is not None and group.length > sliding_window:
            place = torch.arange(group.length, device=query.device)
            distance = place[:, None] - place[None, :]
            visible = (distance >= 0) & (distance < sliding_window)
        if query.device.type == "cpu" and group.length <= SHORT:
            out = _short_attention(q, k, v, scaling, visible, dropout)
        else:
            grouped = q.shape[1] != k.shape[1]
            if grouped and visible is not None:
                # With a mask, torch's fused kernels on GPUs do not take grouped heads.
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
                grouped = False
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=visible,
                dropout_p=dropout,
                is_causal=visible is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        outputs.append(out if group.rows_nL is None else out.transpose(0, 1).flatten(1, 2).unsqueeze(0))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out if layout.order_T is None else out.index_select(2, layout.order_T)


def _short_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, visible: Tensor | None, dropout: float) -> Tensor:
    """Causal attention (n, H, L, d) with the scores made whole, in fp32; `visible` (L, L) narrows what is seen."""
    wide = torch.promote_types(q.dtype, torch.float32)
    length = q.shape[2]
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if visible is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    hidden = torch.zeros(length, length, dtype=wide, device=q.device).masked_fill(~visible, float("-inf"))
    q_wide, k_wide = (t.flatten(0, 1).to(wide) for t in (q, k))
    scores = torch.baddbmm(hidden.expand(q_wide.shape[0], -1, -1), q_wide, k_wide.transpose(1, 2), alpha=scaling)
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout).to(v.dtype)
    return (weights @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


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
