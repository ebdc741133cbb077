"""A packed row's queries, keys and values as the groups of documents that are computed together, and back.

Shapes: T tokens, H query heads, K key heads, G = H / K; B = K * n for n documents of a group, L their padded length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.ops.documents import Heads


class HeadGroups:
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
        else:
            row = torch.empty((heads.num_places * num_heads, width), dtype=dtype)
        return row, self.views(row, num_heads, shared=shared)

    def views(self, flat: Tensor, num_heads: int, *, shared: bool) -> list[Tensor]:
        """The groups' own parts of what `empty` gave."""
        return [self._view(flat.transpose(0, 1), shared)] if self.heads.is_one else self._groups(flat, num_heads, shared)

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
