"""What the ranks of a job do together: sums, decisions of one for all, errors of one that all raise.

Every way in tells that this rank has come so far (`tick`), and counts how long it then waits for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from qlora.errors import LaunchError, QloraError, StopRequested

T = TypeVar("T")


class Ranks:
    """The collectives of a job's processes. `Runtime` is one; what its attributes are is said there."""

    rank: int
    world_size: int
    device: torch.device
    stop_requested: Callable[[], bool]
    tick: Callable[..., None]
    waited_seconds: float

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place. Collective."""
        if self.world_size > 1:
            with self._waiting():
                torch.distributed.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Largest over ranks, in place. Collective."""
        if self.world_size > 1:
            with self._waiting():
                torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        if self.world_size > 1:
            with self._waiting():
                torch.distributed.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective. Pickles: for our own small objects only."""
        if self.world_size == 1:
            return value
        box = [value]
        with self._waiting():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank. Collective. Pickles: for our own small objects only."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with self._waiting():
            torch.distributed.all_gather_object(gathered, value)
        return gathered

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """For what waits for other ranks."""
        self.tick()
        began = time.perf_counter()
        yield
        self.waited_seconds += time.perf_counter() - began

    def from_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone; every rank gets its result. Collective.

        Raises:
            QloraError: raised on rank 0 it is raised on every rank, so that none waits for the others.
            RuntimeError: on the other ranks, where rank 0 raised anything else.
        """
        self.tick()
        value: Any = None
        error: Exception | None = None
        bug: Exception | None = None
        if self.is_main:
            try:
                value = work()
            except QloraError as raised:
                error = raised
            except Exception as raised:  # may not survive the way to other processes
                bug, error = raised, RuntimeError(f"the main rank failed: {type(raised).__name__}: {raised}")
        value, error = self.broadcast_object((value, error))
        if bug is not None:
            raise bug
        if error is not None:
            raise error
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Do rank-local work on every rank and wait for all. Collective; the work may hold no collective.

        Raises:
            QloraError: raised on any rank it is raised on every rank; the lowest rank's, where several raise.
            RuntimeError: on the others, where a rank raised anything else.
            StopRequested: a rank was asked to stop, and none raises anything else.
        """
        self.tick()
        value: Any = None
        error: Exception | None = None
        try:
            value = work()
        except Exception as raised:
            error = raised
        own = 2.0 if error is not None else float(self.stop_requested())
        gravest = self.max(torch.tensor([own], device=self.device)).item()
        if gravest == 0:
            return value
        if gravest == 1:
            raise StopRequested
        # Other exceptions may not survive the way to other processes.
        told: list[Any] = [error if error is None or isinstance(error, QloraError) else f"{type(error).__name__}: {error}"]
        if self.world_size > 1:
            own, told = told[0], [None] * self.world_size
            torch.distributed.all_gather_object(told, own)
        if error is not None and not isinstance(error, QloraError):
            raise error
        rank, first = next((rank, other) for rank, other in enumerate(told) if other is not None)
        raise first if isinstance(first, QloraError) else RuntimeError(f"rank {rank} failed: {first}")

    def refuse_differences(self, facts: dict[str, str]) -> None:
        """Make sure that all ranks hold the same. Collective.

        Raises:
            LaunchError: on every rank, naming the facts that differ.
        """
        if self.world_size == 1:
            return
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, facts)
        differing = [name for name in facts if len({str(other.get(name)) for other in gathered}) > 1]
        if differing:
            raise LaunchError(
                f"the ranks do not hold the same {', '.join(differing)}",
                place="launch",
                found="; ".join(f"rank {rank}: {other[differing[0]][:12]}" for rank, other in enumerate(gathered[:4])),
                next_step="give every node the same files, job file and cache",
            )
