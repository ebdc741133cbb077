"""Causal attention inside documents on a CPU, as one autograd function: scores are made tile by tile, and made again in
backward, so that queries, keys, values and one number a query are all that is kept.

torch's fused kernel computes bf16 at the speed of fp32 on CPUs, and far slower than that for short documents. Here products
are batched over documents and heads in the input's dtype, which CPUs with bf16 products compute much faster, and a
tile of scores stays in the cache. Query heads that share a key head are rows of one product, so keys and values are never
repeated. Above the diagonal nothing is computed but what falls into a tile.

    S = scale q k^T      P = softmax(S)      o = P v
    dv = P^T do      dP = do v^T      dS = P (dP - sum(P dP)) scale      dq = dS k      dk = dS^T q

A bf16 product rounds what it gives, and softmax would make much of a large score's last digit. So forward computes S twice:
once to know each row's largest score, and once less that score, which the product takes off before it rounds. What weighs is
then near zero, and rounded by less than P itself is. The largest scores are kept for backward. fp32 products are slower than
two in bf16.

Shapes: T tokens, H query heads, K key heads, G = H / K; B = K * n for n documents of a group, L their padded length; d and e
head sizes of keys and values; r queries and c keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops.documents import DocumentLayout
from qlora.ops.head_groups import HeadGroups
from qlora.ops.scratch import buffers

# Scores of a tile.
TILE_ELEMENTS = 1 << 21
# Tiles a document is cut into, at least, where each then has so many queries: what lies above the diagonal is skipped.
FEWEST_PARTS = 8
FEWEST_QUERIES = 64
# Key heads of a tile, where it holds as few queries as that: a product over a few shares its work out better.
PAIRS_TOGETHER = 3
# Triangles of masks are made in sizes that are multiples of this.
MASK_STEP = 128


def attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of each token over its own document. Rank-local; differentiable once.

    Args:
        query: (1, H, T, d); key: (1, K, T, d); value: (1, K, T, e), with H a multiple of K; float, with any strides.
        scaling: factor of the scores, above zero.
        sliding_window: a token sees this many tokens, itself included; None for all before it.

    Returns:
        (1, H, T, e), lying in memory as (1, T, H, e) does.
    """
    return _DocumentAttention.apply(query, key, value, layout, scaling, sliding_window)


@dataclass(frozen=True)
class _Tile:
    """Queries [first, last) of some of a group's (key head, document) pairs, and the keys [first_key, last) they see."""

    pairs: slice
    first: int
    last: int
    first_key: int

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        return self.pairs, slice(None), slice(self.first, self.last)

    @property
    def keys(self) -> tuple[slice, slice]:
        return self.pairs, slice(self.first_key, self.last)

    def shape(self, num_shared: int) -> tuple[int, int, int]:
        """Of its scores, (B, G r, c)."""
        return self.pairs.stop - self.pairs.start, num_shared * (self.last - self.first), self.last - self.first_key


def _tiles(num_pairs: int, num_shared: int, length: int, window: int | None) -> Iterator[_Tile]:
    """Tiles that cover a group: runs of queries of as many pairs as fit."""
    wanted = -(-length // FEWEST_PARTS) if window is None else min(-(-length // FEWEST_PARTS), window // 2)
    most = min(length, max(FEWEST_QUERIES, wanted))
    few = min(most, FEWEST_QUERIES)
    together = max(
        TILE_ELEMENTS // (num_shared * most * length),
        min(PAIRS_TOGETHER, TILE_ELEMENTS // (num_shared * few * length)),
        1,
    )
    for pair in range(0, num_pairs, together):
        pairs = slice(pair, min(pair + together, num_pairs))
        first = 0
        while first < length:
            first_key = 0 if window is None else max(0, first - window + 1)
            # The more keys are seen before them, the fewer queries fit: r (seen + r) scores a head.
            seen, room = first - first_key, TILE_ELEMENTS // ((pairs.stop - pair) * num_shared)
            fitting = (math.isqrt(seen**2 + 4 * room) - seen) // 2
            last = min(length, first + min(most, max(few, fitting)))
            yield _Tile(pairs, first, last, first_key)
            first = last


def _hide(scores_Brc: Tensor, tile: _Tile, num_shared: int, layout: DocumentLayout, window: int | None) -> None:
    """Take what a query does not see out of a tile of scores, in place."""
    num_queries, num_keys = tile.last - tile.first, tile.last - tile.first_key
    by_head = scores_Brc.unflatten(1, (num_shared, num_queries))
    offset = tile.first - tile.first_key
    if window is not None:
        by_head.add_(layout.hidden(num_queries, num_keys, offset, window, scores_Brc.dtype))
        return
    # Only the last square is not seen whole; those of all sizes are corners of a few.
    side = -(-num_queries // MASK_STEP) * MASK_STEP
    triangle = layout.hidden(side, side, 0, None, scores_Brc.dtype)[:num_queries, :num_queries]
    by_head[..., offset:].add_(triangle)


def _multiply(left_Brc: Tensor, right_Bcd: Tensor, out: Tensor) -> None:
    """Write a batch of products where they belong: (B, r, d), or (B, G, r / G, d), of any strides."""
    if out.is_contiguous():
        torch.bmm(left_Brc, right_Bcd, out=out.view(len(out), -1, out.shape[-1]))
    else:
        out.copy_(torch.bmm(left_Brc, right_Bcd).view(out.shape))


class _Scores:
    """Tiles of scores of one group.

    Where the inputs are narrower than fp32, a row's largest score is taken off by the product itself, before it rounds:
    queries and keys have one more column, of that score, rounded and negative, and of ones. Softmax does not see the
    difference; what weighs is then near zero, and rounded by less than its weight is.
    """

    def __init__(self, q_BGLd: Tensor, k_BLd: Tensor, layout: DocumentLayout, scaling: float, window: int | None) -> None:
        num_pairs, self._num_shared, length, _ = q_BGLd.shape
        # One that no document of the group reaches hides nothing.
        self._layout, self._window = layout, None if window is None or window >= length else window
        dtype = q_BGLd.dtype
        self.is_wide = dtype == torch.promote_types(dtype, torch.float32)
        # A power of two changes no digit, and so goes with the keys instead of over all scores.
        self.folded = scaling if self.is_wide else math.ldexp(1.0, math.frexp(scaling)[1] - 1)
        self.rest = scaling / self.folded
        self.keys_BLd = k_BLd * self.folded
        self._keys_more = None
        if not self.is_wide:
            self._keys_more = torch.cat([self.keys_BLd, k_BLd.new_ones(num_pairs, length, 1)], 2)
        self.tiles = list(_tiles(num_pairs, self._num_shared, length, self._window))
        most = max(math.prod(tile.shape(self._num_shared)) for tile in self.tiles)
        self._scratch = buffers(2, (1, most), dtype, torch.device("cpu"))

    def scratch(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """Two tensors of a tile's shape (B, G r, c), with anything in them; every tile's are the same memory."""
        shape = tile.shape(self._num_shared)
        first, second = (flat[0, : math.prod(shape)].view(shape) for flat in self._scratch)
        return first, second

    def largest(self, tile: _Tile, q_Brd: Tensor, out: Tensor) -> Tensor:
        """Each query's largest score before scaling (B, G r, 1), as the inputs' dtype has it. Writes to `out`."""
        return self._seen(tile, q_Brd, self.keys_BLd, out).amax(-1, keepdim=True)

    def weights(self, tile: _Tile, q_Brd: Tensor, top_Br1: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """Softmax of the scores (B, G r, c)."""
        if self._keys_more is None:
            scores = self._seen(tile, q_Brd, self.keys_BLd, scratch)
        else:
            scores = self._seen(tile, torch.cat([q_Brd, -top_Br1], 2), self._keys_more, scratch)
        if self.rest != 1.0:
            scores.mul_(self.rest)
        return torch.softmax(scores, -1, out=out)

    def _seen(self, tile: _Tile, q_Brd: Tensor, keys_BLd: Tensor, out: Tensor) -> Tensor:
        torch.bmm(q_Brd, keys_BLd[tile.keys].contiguous().transpose(1, 2), out=out)
        _hide(out, tile, self._num_shared, self._layout, self._window)
        return out


def _rows(x_BGLd: Tensor, tile: _Tile) -> Tensor:
    """A tile's queries, or what belongs to them (B, G r, d). Products copy what is not contiguous, transposed slowly."""
    return x_BGLd[tile.queries].flatten(1, 2).contiguous()


def _forward_group(
    q_BGLd: Tensor, k_BLd: Tensor, v_BLe: Tensor, out_BGLe: Tensor, top_BGL1: Tensor, layout: DocumentLayout,
    scaling: float, window: int | None,
) -> None:  # fmt: skip
    """Attention of one group into `out`, and each query's largest score into `top`, both of any strides."""
    scores = _Scores(q_BGLd, k_BLd, layout, scaling, window)
    for tile in scores.tiles:
        first, second = scores.scratch(tile)
        q_Brd = _rows(q_BGLd, tile)
        top_Br1 = q_Brd[..., :1]
        if not scores.is_wide:
            top_Br1 = scores.largest(tile, q_Brd, first)
            own = top_BGL1[tile.queries]
            own.copy_(top_Br1.view(own.shape))
        weights = scores.weights(tile, q_Brd, top_Br1, first, second)
        _multiply(weights, v_BLe[tile.keys].contiguous(), out_BGLe[tile.queries])


def _backward_group(
    q_BGLd: Tensor, k_BLd: Tensor, v_BLe: Tensor, do_BGLe: Tensor, top_BGL1: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], layout: DocumentLayout, scaling: float, window: int | None,
) -> None:  # fmt: skip
    """Gradients of one group into `grads`, of the shapes of q, k and v and of any strides."""
    dtype, length = v_BLe.dtype, q_BGLd.shape[2]
    scores = _Scores(q_BGLd, k_BLd, layout, scaling, window)
    dq_BGLd, dk, dv = grads
    in_parts = scores.tiles[0].last < length
    dk_BLd, dv_BLe = (
        torch.zeros_like(t, dtype=torch.promote_types(dtype, torch.float32)) if in_parts else t for t in (dk, dv)
    )
    # What all values of a document have in common is in all of a row of dP, and falls out of dS. It is taken off before
    # dP and P are rounded, or what they lose of it would weigh as much as what they differ by.
    centred_BLe = v_BLe if scores.is_wide else v_BLe - v_BLe.mean(1, keepdim=True)
    for tile in scores.tiles:
        first, second = scores.scratch(tile)
        q_Brd, do_Bre = _rows(q_BGLd, tile), _rows(do_BGLe, tile)
        keys_Bcd, values_Bce = scores.keys_BLd[tile.keys].contiguous(), centred_BLe[tile.keys].contiguous()
        weights = scores.weights(tile, q_Brd, _rows(top_BGL1, tile).to(dtype), first, second)
        if in_parts:
            dv_BLe[tile.keys] += torch.bmm(weights.transpose(1, 2), do_Bre)
        else:
            _multiply(weights.transpose(1, 2), do_Bre, dv_BLe[tile.pairs])
        dweights = torch.bmm(do_Bre, values_Bce.transpose(1, 2), out=first)
        dscores = torch.ops.aten._softmax_backward_data.out(dweights, weights, -1, dtype, grad_input=dweights)
        if scores.rest != 1.0:
            dscores.mul_(scores.rest)
        _multiply(dscores, keys_Bcd, dq_BGLd[tile.queries])
        if in_parts:
            dk_BLd[tile.keys] += torch.bmm(dscores.transpose(1, 2), q_Brd)
        else:
            _multiply(dscores.transpose(1, 2), q_Brd, dk_BLd[tile.pairs])
    dk_BLd.mul_(scores.folded)
    if in_parts:
        dk.copy_(dk_BLd)
        dv.copy_(dv_BLe)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, window: int | None
    ) -> Tensor:
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        groups = HeadGroups(layout.heads(num_heads, num_kv_heads))
        out, outs = groups.empty(num_heads, value.shape[-1], value.dtype, shared=False)
        top, tops = groups.empty(num_heads, 1, torch.promote_types(value.dtype, torch.float32), shared=False)
        inputs = (groups.cut(query, shared=False), groups.cut(key, shared=True), groups.cut(value, shared=True))
        for q, k, v, own_out, own_top in zip(*inputs, outs, tops, strict=True):
            _forward_group(q, k, v, own_out, own_top, layout, scaling, window)
        ctx.save_for_backward(query, key, value, top)
        ctx.layout, ctx.scaling, ctx.window = layout, scaling, window
        return groups.join(out, num_heads, shared=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, top = ctx.saved_tensors
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        groups = HeadGroups(ctx.layout.heads(num_heads, num_kv_heads))
        tops = groups.views(top, num_heads, shared=False)
        inputs = (groups.cut(query, shared=False), groups.cut(key, shared=True), groups.cut(value, shared=True))
        directions = groups.cut(grad_outputs[0].to(value.dtype), shared=False, padding_is_zero=True)
        sizes = ((num_heads, query, False), (num_kv_heads, key, True), (num_kv_heads, value, True))
        made = [groups.empty(count, t.shape[-1], value.dtype, shared=shared) for count, t, shared in sizes]
        for q, k, v, do, own_top, *grads in zip(*inputs, directions, tops, *(parts for _, parts in made), strict=True):
            _backward_group(
                q, k, v, do, own_top, tuple(grads), ctx.layout, ctx.scaling, ctx.window
            )  # fmt: skip
        found = [groups.join(flat, count, shared=shared) for (flat, _), (count, _, shared) in zip(made, sizes, strict=True)]
        return *found, None, None, None
