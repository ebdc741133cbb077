"""Attention inside documents by torch's own attention, where no kernel takes a packed row.

The row is cut at its document boundaries. Documents of like length are computed in one call: causal attention needs no mask
for padding on the right, because a padded key comes after every real query.

Shapes: H heads, T tokens of a row, n documents of a group, L their padded length, d and e head sizes of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.ops.documents import DocumentLayout


def segmented_attention(
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
        query: (1, H, T, d); key: (1, Hkv, T, d); value: (1, Hkv, T, e), with H a multiple of Hkv; float, on any device.
        scaling: factor of the scores.
        sliding_window: a token sees this many tokens, itself included; None for all before it.
        dropout: probability of dropping a weight.

    Returns:
        (1, H, T, e).
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
