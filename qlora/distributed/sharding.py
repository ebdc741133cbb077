"""How one copy of a base is shared out over ranks while it is loaded.

Under ZeRO-3 rank r of N keeps the elements [r * length, (r + 1) * length) of each flattened parameter, with
length = ceil(n / N); what the last ranks lack is padding. That is DeepSpeed's own cut, so that what a rank has read is
what it keeps. Everywhere else every rank keeps everything, which is the same with N = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Together(Protocol):
    """Does rank-local work on every rank; an error of one becomes everybody's. `Runtime.together` is one."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def alone(work: Callable[[], T], /) -> T:
    """The work of one rank that waits for no other."""
    return work()


class Sharding:
    """Every rank keeps everything: one process, data parallel, ZeRO-1 and 2. `zero.ZeroSharding` is the other kind.

    Attributes:
        rank, world_size: this one, and among how many one copy is shared out.
        together: see `Together`.
        worker, num_workers: this process among all that load the base, who may share work also where each keeps a copy.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, together: Together = alone, *, worker: int = 0, num_workers: int = 1
    ) -> None:
        self.rank, self.world_size, self.together = rank, world_size, together
        self.worker, self.num_workers = worker, num_workers

    def run(self, num_elements: int, rank: int | None = None) -> tuple[int, int]:
        """First and last (exclusive) element of a rank's run, this one's unless told; empty where there is none left."""
        length = -(-num_elements // self.world_size)
        start = min((self.rank if rank is None else rank) * length, num_elements)
        return start, min(start + length, num_elements)

    def exchange(self, own: Tensor) -> Tensor:
        """All ranks' flat tensors of one length, one after another. Collective where a copy is shared out."""
        return own

    def broadcast(self, value: Tensor, worker: int) -> Tensor:
        """One worker's tensor, in the place of the others' of its shape and dtype. Collective where there are several."""
        if self.num_workers > 1:
            torch.distributed.broadcast(value, worker)
        return value

    def keep(self, parameter: nn.Parameter) -> None:
        """Cut a parameter of which this rank's run is filled down to that run. Rank-local; a collective for a disk."""

    def home(self, device: torch.device) -> torch.device | None:
        """Where what is kept lies, for a rank that computes on a device; None for a disk."""
        return device
