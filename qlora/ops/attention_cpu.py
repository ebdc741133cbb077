"""Causal attention inside documents on a CPU, as one autograd function: scores are made tile by tile, and made again in
backward, so that queries, keys, values and one number a query are all that is kept.

torch's fused kernel computes bf16 at the speed of fp32 on CPUs, and far slower than that for short documents. Here products
are batched over documents and heads in the input's dtype, which CPUs with bf16 products compute three times as fast, and a
tile of scores stays in the cache. Query heads that share a key head are rows of one product, so keys and values are never
repeated. Above the diagonal nothing is computed but what falls into a tile.

    S = scale q k^T      P = softmax(S)      o = P v
    dv = P^T do      dP = do v^T      dS = P (dP - sum(P dP)) scale      dq = dS k      dk = dS^T q

Forward computes S in fp32. In backward it comes out of a bf16 product, less the row's largest score, which the product takes
off before it rounds (two more columns hold it): what weighs is then near zero, and rounded by less than P itself is.

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

from qlora.ops.documents import DocumentLayout, Heads
from qlora.ops.scratch import buffers

# Scores of a tile. Within a factor of 4 it makes no difference on two cores.
TILE_ELEMENTS = 1 << 19
# Fewest queries of a tile, where that many make more scores than a tile has.
FEWEST_QUERIES = 32
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


def _tiles(num_pairs: int, num_shared: int, length: int, window: int | None) -> Iterator[_Tile]:
    """Tiles that cover a group: whole documents where several fit, runs of queries where one does not."""
    together = TILE_ELEMENTS // (num_shared * length * length)
    if together:
        for pair in range(0, num_pairs, together):
            yield _Tile(slice(pair, min(pair + together, num_pairs)), 0, length, 0)
        return
    for pair in range(num_pairs):
        first = 0
        while first < length:
            first_key = 0 if window is None else max(0, first - window + 1)
            # The more keys are seen, the fewer queries fit.
            keys = first - first_key + FEWEST_QUERIES
            last = min(length, first + max(FEWEST_QUERIES, min(length // 4, TILE_ELEMENTS // (num_shared * keys))))
            yield _Tile(slice(pair, pair + 1), first, last, first_key)
            first = last


class _Scratch:
    """Two tiles in the dtype of scores and one in that of the inputs; the last is the first where these are the same."""

    def __init__(self, tiles: list[_Tile], num_shared: int, dtype: torch.dtype) -> None:
        self.wide = torch.promote_types(dtype, torch.float32)
        most = max((t.pairs.stop - t.pairs.start) * num_shared * (t.last - t.first) * (t.last - t.first_key) for t in tiles)
        self._first, self._second, third = buffers(3, (1, most), self.wide, torch.device("cpu"))
        self._narrow = third.view(dtype)

    def scores(self, shape: tuple[int, ...]) -> Tensor:
        return _shaped(self._first, shape)

    def softmax(self, shape: tuple[int, ...]) -> Tensor:
        return _shaped(self._second, shape)

    def narrow(self, shape: tuple[int, ...]) -> Tensor:
        return _shaped(self._narrow, shape)


def _shaped(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[0, : math.prod(shape)].view(shape)


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


def _forward_group(
    q_BGLd: Tensor, k_BLd: Tensor, v_BLe: Tensor, out_BGLe: Tensor, top_BGL: Tensor, layout: DocumentLayout,
    scaling: float, window: int | None,
) -> None:  # fmt: skip
    """Attention of one group into `out`, and each query's largest score into `top`, both of any strides."""
    num_pairs, num_shared, length, _ = q_BGLd.shape
    tiles = list(_tiles(num_pairs, num_shared, length, window))
    scratch = _Scratch(tiles, num_shared, v_BLe.dtype)
    k_wide = k_BLd.to(scratch.wide)
    for tile in tiles:
        q_Brd = q_BGLd[tile.queries].flatten(1, 2).to(scratch.wide) * scaling
        shape = (len(q_Brd), q_Brd.shape[1], tile.last - tile.first_key)
        scores = torch.bmm(q_Brd, k_wide[tile.keys].transpose(1, 2), out=scratch.scores(shape))
        _hide(scores, tile, num_shared, layout, window)
        top_BGL[tile.queries] = scores.amax(-1).unflatten(1, (num_shared, -1))
        weights = torch.softmax(scores, -1, out=scratch.softmax(shape))
        _multiply(scratch.narrow(shape).copy_(weights), v_BLe[tile.keys], out_BGLe[tile.queries])


def _backward_group(
    q_BGLd: Tensor, k_BLd: Tensor, v_BLe: Tensor, do_BGLe: Tensor, top_BGL: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], layout: DocumentLayout, scaling: float, window: int | None,
) -> None:  # fmt: skip
    """Gradients of one group into `grads`, of the shapes of q, k and v and of any strides."""
    num_pairs, num_shared, length, _ = q_BGLd.shape
    dtype = v_BLe.dtype
    tiles = list(_tiles(num_pairs, num_shared, length, window))
    scratch = _Scratch(tiles, num_shared, dtype)
    is_wide = dtype == scratch.wide
    dq_BGLd, dk, dv = grads
    in_parts = tiles[0].last < length
    dk_BLd, dv_BLe = (torch.zeros_like(t, dtype=scratch.wide) if in_parts else t for t in (dk, dv))
    # A power of two changes no digit, and so goes with the keys instead of over all scores.
    folded = scaling if math.frexp(scaling)[0] == 0.5 else 1.0
    rest = scaling / folded
    k_BLd = k_BLd * folded
    if not is_wide:
        k_more = torch.cat([k_BLd, k_BLd.new_ones(num_pairs, length, 2)], 2)
    for tile in tiles:
        q_Brd, do_Bre = q_BGLd[tile.queries].flatten(1, 2), do_BGLe[tile.queries].flatten(1, 2)
        keys_Bcd, values_Bce = k_BLd[tile.keys], v_BLe[tile.keys]
        shape = (len(q_Brd), q_Brd.shape[1], keys_Bcd.shape[1])
        scores, narrow = scratch.scores(shape), scratch.narrow(shape)
        if is_wide:
            torch.bmm(q_Brd, keys_Bcd.transpose(1, 2), out=scores)
        else:
            top_Br1 = top_BGL[tile.queries].flatten(1, 2).unsqueeze(2) / -rest
            rounded = top_Br1.to(dtype)
            q_more = torch.cat([q_Brd, rounded, (top_Br1 - rounded).to(dtype)], 2)
            scores.copy_(torch.bmm(q_more, k_more[tile.keys].transpose(1, 2), out=narrow))
        if rest != 1.0:
            scores.mul_(rest)
        _hide(scores, tile, num_shared, layout, window)
        weights = torch.softmax(scores, -1, out=scratch.softmax(shape))
        narrow.copy_(weights)
        if in_parts:
            dv_BLe[tile.keys] += torch.bmm(narrow.transpose(1, 2), do_Bre)
        else:
            _multiply(narrow.transpose(1, 2), do_Bre, dv_BLe[tile.pairs])
        torch.bmm(do_Bre, values_Bce.transpose(1, 2), out=narrow)
        dscores = torch.ops.aten._softmax_backward_data.out(
            scores.copy_(narrow), weights, -1, scratch.wide, grad_input=scores
        )
        narrow.copy_(dscores if rest == 1.0 else dscores.mul_(rest))
        _multiply(narrow, keys_Bcd, dq_BGLd[tile.queries])
        if in_parts:
            dk_BLd[tile.keys] += torch.bmm(narrow.transpose(1, 2), q_Brd)
        else:
            _multiply(narrow.transpose(1, 2), q_Brd, dk_BLd[tile.pairs])
    dk_BLd.mul_(folded)
    if in_parts:
        dk.copy_(dk_BLd)
        dv.copy_(dv_BLe)


class _Groups:
    """Tensors cut into groups: (1, H, T, d) outside is (B, G, L, d) a group, or (B, L, d) where heads are shared."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def cut(self, x_1HTd: Tensor, *, shared: bool, padding_is_zero: bool = False) -> list[Tensor]:
        """The groups' own tensors."""
        heads, num_heads = self.heads, x_1HTd.shape[1]
        if heads.is_one:
            return [self._view(x_1HTd[0], shared).contiguous()]
        rows = x_1HTd.transpose(1, 2).reshape(-1, x_1HTd.shape[-1])
        flat = rows.index_select(0, heads.source_kv if shared else heads.source_q)
        if padding_is_zero and len(heads.padding_q):
            flat.index_fill_(0, heads.padding_q, 0)
        return self._groups(flat, num_heads, shared)

    def empty(self, num_heads: int, width: int, dtype: torch.dtype, *, shared: bool) -> tuple[Tensor, list[Tensor]]:
        """A tensor to be written group by group, and its groups' views."""
        heads = self.heads
        if heads.is_one:
            row = torch.empty((heads.num_tokens, num_heads, width), dtype=dtype)
            return row, [self._view(row.transpose(0, 1), shared)]
        flat = torch.empty((heads.num_places * num_heads, width), dtype=dtype)
        return flat, self._groups(flat, num_heads, shared)

    def join(self, flat: Tensor, num_heads: int, *, shared: bool) -> Tensor:
        """What `empty` gave, when it is written, as (1, H, T, d) that lies in memory as (1, T, H, d) does."""
        heads = self.heads
        if not heads.is_one:
            flat = flat.index_select(0, heads.place_kv if shared else heads.place_q).unflatten(0, (-1, num_heads))
        return flat.unsqueeze(0).transpose(1, 2)

    def _view(self, x_HTd: Tensor, shared: bool) -> Tensor:
        return x_HTd if shared else x_HTd.unflatten(0, (self.heads.num_kv_heads, -1))

    def _groups(self, flat: Tensor, num_heads: int, shared: bool) -> list[Tensor]:
        parts, start = [], 0
        for num_documents, length in self.heads.shapes:
            part = flat[start : start + num_documents * length * num_heads]
            start += len(part)
            num_pairs = num_documents * self.heads.num_kv_heads
            parts.append(part.view(num_pairs, length, -1) if shared else part.view(num_pairs, -1, length, part.shape[1]))
        return parts


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, window: int | None
    ) -> Tensor:
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        groups = _Groups(layout.heads(num_heads, num_kv_heads))
        out, outs = groups.empty(num_heads, value.shape[-1], value.dtype, shared=False)
        top, tops = groups.empty(num_heads, 1, torch.promote_types(value.dtype, torch.float32), shared=False)
        inputs = (groups.cut(query, shared=False), groups.cut(key, shared=True), groups.cut(value, shared=True))
        for q, k, v, own_out, own_top in zip(*inputs, outs, tops, strict=True):
            _forward_group(q, k, v, own_out, own_top.squeeze(-1), layout, scaling, window)
        ctx.save_for_backward(query, key, value, top)
        ctx.layout, ctx.scaling, ctx.window = layout, scaling, window
        return groups.join(out, num_heads, shared=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, top = ctx.saved_tensors
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        groups = _Groups(ctx.layout.heads(num_heads, num_kv_heads))
        tops = [groups._view(top.transpose(0, 1), False)] if groups.heads.is_one else groups._groups(top, num_heads, False)
        inputs = (groups.cut(query, shared=False), groups.cut(key, shared=True), groups.cut(value, shared=True))
        directions = groups.cut(grad_outputs[0].to(value.dtype), shared=False, padding_is_zero=True)
        sizes = ((num_heads, query, False), (num_kv_heads, key, True), (num_kv_heads, value, True))
        made = [groups.empty(count, t.shape[-1], value.dtype, shared=shared) for count, t, shared in sizes]
        for q, k, v, do, own_top, *grads in zip(*inputs, directions, tops, *(parts for _, parts in made), strict=True):
            _backward_group(
                q, k, v, do, own_top.squeeze(-1), tuple(grads), ctx.layout, ctx.scaling, ctx.window
            )  # fmt: skip
        found = [groups.join(flat, count, shared=shared) for (flat, _), (count, _, shared) in zip(made, sizes, strict=True)]
        return *found, None, None, None
