"""Where the documents of a packed row lie, and what ways of computing attention need to know of it.

The lengths are known on the host. What follows from them is worked out when a way first asks, once a batch, and goes to the
device without the host waiting for it: all layers of a model share it.

Shapes: T tokens of a row, n documents of a group, L their padded length, H query heads, K key heads, G = H / K.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Documents are computed together while padding them costs less than starting another kernel: up to a quarter more
# tokens, and always within the same multiple of 16.
GROUP_RATIO = 1.25
GROUP_STEP = 16


@dataclass(frozen=True)
class DocumentGroup:
    """Documents computed in one call. `rows_nL` holds each token's place in the row; padding repeats place 0."""

    rows_nL: Tensor | None  # None: the single document [start, start + length)
    start: int
    length: int


@dataclass(frozen=True)
class Heads:
    """A row's heads cut into groups, as places in flat tensors of one head's row each; int64.

    Outside, row t * H + h is head h of token t. Inside, each group is (K, n, G, L), or (K, n, L) for key heads, one after
    another.

    Attributes:
        is_one: the row is one document: nothing is cut, and the tensors are empty.
        num_tokens: T. num_places: sum over groups of n L. num_kv_heads: K. shapes: (n, L) of each group.
        source_q, source_kv: for each place inside, the row outside that goes there; padding repeats one of token 0.
        place_q, place_kv: for each row outside, its place inside.
        padding_q: the places inside of query heads that hold padding.
    """

    is_one: bool
    num_tokens: int
    num_places: int
    num_kv_heads: int
    shapes: tuple[tuple[int, int], ...]
    source_q: Tensor
    source_kv: Tensor
    place_q: Tensor
    place_kv: Tensor
    padding_q: Tensor


@dataclass(frozen=True)
class DocumentLayout:
    """The documents of one packed row.

    Attributes:
        lengths: tokens of each document, in the row's order; their sum is the row's length T.
        device: where attention is computed.
    """

    lengths: tuple[int, ...]
    device: torch.device
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> DocumentLayout:
        """Build the layout of a row. Raises ValueError where a document is empty."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a packed row needs documents of at least one token, got lengths {tuple(lengths)}")
        return cls(tuple(int(n) for n in lengths), torch.device(device))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where each document begins, and the row's length (documents + 1,), int32, on the device."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
        return self._on_device(starts)

    @cached_property
    def document_T(self) -> Tensor:
        """Each token's document (T,), int32, on the device."""
        return self._on_device(
            torch.arange(len(self.lengths), dtype=torch.int32).repeat_interleave(torch.tensor(self.lengths))
        )

    @cached_property
    def groups(self) -> tuple[DocumentGroup, ...]:
        """Documents of like length together, the shortest first."""
        return tuple(group for group, _ in self._grouped)

    @cached_property
    def order_T(self) -> Tensor | None:
        """For each token of the row, its place in the groups' concatenated outputs; None where that is the identity."""
        if len(self.lengths) == 1:
            return None
        starts = self._starts()
        order = torch.empty(sum(self.lengths), dtype=torch.int64)
        offset = 0
        for group, members in self._grouped:
            for i in members:
                order[starts[i] : starts[i] + self.lengths[i]] = torch.arange(offset, offset + self.lengths[i])
                offset += group.length
        return self._on_device(order)

    @cached_property
    def _grouped(self) -> list[tuple[DocumentGroup, list[int]]]:
        """Groups and which documents they hold."""
        lengths, starts = self.lengths, self._starts()
        by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
        grouped = []
        while by_length:
            limit = max(lengths[by_length[0]] * GROUP_RATIO, -(-lengths[by_length[0]] // GROUP_STEP) * GROUP_STEP)
            members = [i for i in by_length if lengths[i] <= limit]
            by_length = by_length[len(members) :]
            longest = lengths[members[-1]]
            if len(members) == 1:
                grouped.append((DocumentGroup(None, starts[members[0]], longest), members))
                continue
            places = torch.arange(longest)
            rows = torch.zeros(len(members), longest, dtype=torch.int64)
            for row, i in enumerate(members):
                rows[row, : lengths[i]] = starts[i] + places[: lengths[i]]
            grouped.append((DocumentGroup(self._on_device(rows), 0, longest), members))
        return grouped

    def _starts(self) -> list[int]:
        starts = [0]
        for length in self.lengths[:-1]:
            starts.append(starts[-1] + length)
        return starts

    def _on_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def remember(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes, once for all layers that ask for it by this name."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    def heads(self, num_heads: int, num_kv_heads: int) -> Heads:
        """How so many heads are cut into groups. On the CPU."""
        return self.remember(("heads", num_heads, num_kv_heads), lambda: self._cut_heads(num_heads, num_kv_heads))

    def _cut_heads(self, H: int, K: int) -> Heads:
        num_tokens = sum(self.lengths)
        if len(self.lengths) == 1:
            none = torch.empty(0, dtype=torch.int64)
            return Heads(True, num_tokens, num_tokens, K, ((1, num_tokens),), none, none, none, none, none)
        rows = [
            torch.arange(g.start, g.start + g.length)[None] if g.rows_nL is None else g.rows_nL.cpu() for g in self.groups
        ]
        source_q = torch.cat([_spread(own, torch.arange(H).view(K, 1, H // K, 1), H, queries=True) for own in rows])
        source_kv = torch.cat([_spread(own, torch.arange(K).view(K, 1, 1), K, queries=False) for own in rows])
        # Padding repeats place 0, which itself is the first of its document.
        real = [((own != 0) | (torch.arange(own.shape[1]) == 0)) for own in rows]
        real_q = torch.cat([own[None, :, None].expand(K, -1, H // K, -1).reshape(-1) for own in real])
        real_kv = torch.cat([own[None].expand(K, -1, -1).reshape(-1) for own in real])
        return Heads(
            False,
            num_tokens,
            sum(own.numel() for own in rows),
            K,
            tuple((own.shape[0], own.shape[1]) for own in rows),
            source_q,
            source_kv,
            _places(source_q, real_q, num_tokens * H),
            _places(source_kv, real_kv, num_tokens * K),
            (~real_q).nonzero().squeeze(1),
        )

    def hidden(self, num_queries: int, num_keys: int, offset: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores (queries, keys): 0 where a query sees a key, minus infinity elsewhere. On the CPU.

        Args:
            offset: the first query's place, counted from the first key's.
            window: a query sees this many keys, its own included; None for all before it.
        """

        def make() -> Tensor:
            distance = torch.arange(num_queries)[:, None] + offset - torch.arange(num_keys)[None, :]
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))

        return self.remember(("hidden", num_queries, num_keys, offset, window, dtype), make)


def _spread(rows_nL: Tensor, heads: Tensor, num_heads: int, *, queries: bool) -> Tensor:
    """Rows outside, of each head at these places of the packed row; flat."""
    rows = rows_nL[None, :, None] if queries else rows_nL[None]
    return (rows * num_heads + heads).reshape(-1)


def _places(source: Tensor, is_real: Tensor, num_rows: int) -> Tensor:
    places = torch.empty(num_rows, dtype=torch.int64)
    places[source[is_real]] = torch.arange(len(source))[is_real]
    return places
