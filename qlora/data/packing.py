"""Fills rows of max_length with whole documents.

Documents are taken in an order that depends on the seed alone, and each goes where it fits best: into the pack with the
least room that is still enough. A random order keeps long and short documents mixed; sorting them by length would fill a
little better, and would put all short documents into the same packs. A plan holds for all epochs, so that a pack's number
means the same documents always; which pack comes when is the sampler's matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qlora.data.sampler import permutation

IndexArray = npt.NDArray[np.int64]

_WORD_BITS = 1024
_STREAM = 2**63  # apart from every epoch's, so that packing and the order of packs have nothing in common


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which documents stand in which pack.

    Args:
        documents: (num_documents,) int64, document numbers, pack after pack; each exactly once.
        offsets: (num_packs + 1,) int64, where each pack starts in `documents`, and the end of the last.
        is_packed: whether documents share rows; else each pack is one document.
        hash: sha256 (hexadecimal) of all this.
    """

    documents: IndexArray
    offsets: IndexArray
    is_packed: bool
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        num_documents = len(self.documents)
        if num_documents == 0 or self.offsets[0] != 0 or self.offsets[-1] != num_documents:
            raise ValueError(f"packs over {self.offsets[[0, -1]]} of {num_documents} documents")
        if (np.diff(self.offsets) < 1).any():
            raise ValueError("a pack without documents")
        if not np.array_equal(np.sort(self.documents), np.arange(num_documents)):
            raise ValueError("a document is lost or doubled")
        digest = hashlib.sha256(b"packed" if self.is_packed else b"apart")
        digest.update(self.documents.astype("<i8").tobytes())
        digest.update(self.offsets.astype("<i8").tobytes())
        object.__setattr__(self, "hash", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> IndexArray:
        """The document numbers of one pack, in their order within it."""
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return self.documents[self.offsets[pack] : self.offsets[pack + 1]]


def pack(lengths: Sequence[int] | IndexArray, max_length: int, seed: int) -> PackPlan:
    """Plan packs of at most max_length tokens, by best fit in a seeded order. O(n log n), no state, rank-local.

    Args:
        lengths: (num_documents,) tokens of each document, each from 1 to max_length, at least one document.
        max_length: tokens of a pack.
        seed: decides the order; the same everywhere gives the same plan everywhere.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if len(tokens) == 0 or tokens.min() < 1 or tokens.max() > max_length:
        raise ValueError(f"{len(tokens)} documents must each have 1 to {max_length} tokens")
    order = permutation(len(tokens), seed, _STREAM)
    rooms = _Rooms(max_length)
    num_packs = 0
    placed: list[int] = []
    for length in tokens[order].tolist():
        room = rooms.least_at_least(length)
        if room is None:
            number, room = num_packs, max_length
            num_packs += 1
        else:
            number = rooms.take(room)
        placed.append(number)
        if room > length:
            rooms.put(number, room - length)
    pack_of = np.asarray(placed, dtype=np.int64)
    by_pack = np.argsort(pack_of, kind="stable")
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=offsets[1:])
    return PackPlan(order[by_pack], offsets, is_packed=True)


def one_document_a_pack(num_documents: int) -> PackPlan:
    """The plan where nothing is packed: pack i is document i."""
    return PackPlan(np.arange(num_documents, dtype=np.int64), np.arange(num_documents + 1, dtype=np.int64), is_packed=False)


class _Rooms:
    """Packs by the room they have left, with the least sufficient room found by two looks at bits.

    Python's integers are the bit sets: one word of bits for each 1024 rooms, and one bit a word above them. Searching
    costs the same for any number of packs.
    """

    def __init__(self, max_length: int) -> None:
        self._packs: dict[int, list[int]] = {}
        self._words = [0] * (max_length // _WORD_BITS + 1)
        self._summary = 0

    def least_at_least(self, length: int) -> int | None:
        """The least room that holds `length` tokens and that a pack has; None where no pack has it."""
        index, bit = divmod(length, _WORD_BITS)
        word = self._words[index] >> bit
        if word:
            return length + _lowest_bit(word)
        higher = self._summary >> (index + 1)
        if not higher:
            return None
        index += 1 + _lowest_bit(higher)
        return index * _WORD_BITS + _lowest_bit(self._words[index])

    def put(self, number: int, room: int) -> None:
        """Note a pack's room."""
        packs = self._packs.setdefault(room, [])
        packs.append(number)
        if len(packs) == 1:
            index, bit = divmod(room, _WORD_BITS)
            self._words[index] |= 1 << bit
            self._summary |= 1 << index

    def take(self, room: int) -> int:
        """Remove a pack that has exactly this room, and return its number."""
        packs = self._packs[room]
        number = packs.pop()
        if not packs:
            index, bit = divmod(room, _WORD_BITS)
            self._words[index] ^= 1 << bit
            if not self._words[index]:
                self._summary ^= 1 << index
        return number


def _lowest_bit(word: int) -> int:
    return (word & -word).bit_length() - 1
