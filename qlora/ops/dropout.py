"""Which inputs of A are dropped in training.

In a training step every pack has its own draw, from the step, the layer and the pack's number: which rank computes it, in
which micro-step and beside which others makes no difference, so that a run is the same on any number of ranks. Everywhere
else torch's default generator gives one draw a call.

Nothing drawn is kept: backward and recomputation draw again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packs:
    """The packs that a micro-step computes, in the order of their tokens.

    Attributes:
        key: of the optimizer step.
        numbers: of the packs, in the data's plan.
        lengths: tokens of each.
        row_length: tokens of a row where each pack is a row of its own, padded on the right; None where one follows another.
    """

    key: str
    numbers: tuple[int, ...]
    lengths: tuple[int, ...]
    row_length: int | None = None

    @property
    def num_places(self) -> int:
        """Tokens of a micro-step, padding included."""
        return sum(self.lengths) if self.row_length is None else self.row_length * len(self.lengths)


@dataclass(frozen=True)
class Draw:
    """What a mask is a function of.

    Attributes:
        seed: of the call; of the layer where there are packs.
        packs: None where a call is drawn as one.
    """

    seed: int
    packs: Packs | None = None

    def mask(self, like_TI: Tensor, dropout: float) -> Tensor:
        """Multipliers of dropout, 0 or 1/(1-p), shape, dtype and device of `like_TI`."""
        if self.packs is None:
            return dropout_mask(like_TI, dropout, self.seed)
        packs, out, start = self.packs, torch.ones_like(like_TI), 0
        for number, length in zip(packs.numbers, packs.lengths, strict=True):
            digest = hashlib.sha256(f"{packs.key}/{self.seed}/{number}".encode()).digest()
            part = out[start : start + length]
            part.copy_(dropout_mask(part, dropout, int.from_bytes(digest[:8], "little") >> 1))
            start += packs.row_length or length
        return out


# What this process computes now. Like torch's generator it is of the process: backward runs in threads of its own.
_now: Packs | None = None


@contextmanager
def computing(packs: Packs | None) -> Iterator[None]:
    """Forward and backward passes inside are of these packs. Not to be nested; for one thread of a process."""
    global _now
    _now = packs
    try:
        yield
    finally:
        _now = None


def draw(num_places: int, layer: int) -> Draw:
    """What the mask of a call is drawn from.

    Args:
        num_places: rows of the input; where they are not the packs' tokens (an output head's targets, experts' pairs of a
            token and a choice) the call is drawn as one.
        layer: a number that other layers do not have; 0 for none.
    """
    if _now is not None and layer and _now.num_places == num_places:
        return Draw(layer, _now)
    # On the host from the default generator, so that recomputation, which restores it, draws the same.
    return Draw(int(torch.randint(0, 2**62, ())))


def dropout_mask(like: Tensor, dropout: float, seed: int) -> Tensor:
    """Multipliers of dropout, 0 or 1/(1-p), shape, dtype and device of `like`; a function of the seed alone."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = torch.rand(like.shape, generator=generator, device=like.device) >= dropout
    return keep.to(like.dtype).div_(1.0 - dropout)
