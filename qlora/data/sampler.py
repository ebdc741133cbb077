"""The order of the data as a function: which packs an optimizer step takes, for any number of ranks.

Nothing is drawn and nothing is remembered. An epoch's order is a permutation made from (seed, epoch); the order is cut
into global batches; a rank takes its part of a batch by arithmetic. So a single number, how many packs were taken since
the start, says where a run is, and a run goes on exactly there with other ranks, as long as the global batch stays. It
need not be a multiple of the ranks: a micro-step's places that the batch does not fill stay empty.

A batch never reaches into the next epoch: the last batch of an epoch is smaller where the packs do not divide evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


@lru_cache(maxsize=2)
def permutation(size: int, seed: int, stream: int) -> IndexArray:
    """A permutation of range(size), int64 and read-only, from (seed, stream) alone; an epoch's stream is its number.

    It sorts the raw output of the counter-based generator Philox, which is fixed for all versions of NumPy; the methods
    that shuffle are not, and a resumed run must not depend on the version.
    """
    if not (0 <= seed < 2**64 and 0 <= stream < 2**64):
        raise ValueError(f"seed {seed} and stream {stream} must be unsigned 64-bit numbers")
    keys = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(size)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, order=True)
class Position:
    """Where a run is in its data.

    Args:
        global_index: packs taken since the start of training, over all epochs and ranks.
    """

    global_index: int

    def __post_init__(self) -> None:
        if self.global_index < 0:
            raise ValueError(f"position {self.global_index}")


@dataclass(frozen=True)
class GlobalBatch:
    """The part of an epoch's order that one optimizer step takes, over all ranks.

    Args:
        epoch: from 0.
        start, stop: the first and past the last place in the epoch's order.
    """

    epoch: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.epoch < 0 or not 0 <= self.start < self.stop:
            raise ValueError(f"an empty batch: {self}")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Split:
    """How a global batch is shared out.

    Args:
        world_size: ranks.
        per_device_batch_size: packs a rank and micro-step, at most.
        accumulation_steps: micro-steps an optimizer step.
        global_batch_size: packs an optimizer step takes, over all ranks and micro-steps; None: as many as there are places.
    """

    world_size: int
    per_device_batch_size: int
    accumulation_steps: int
    global_batch_size: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if min(self.world_size, self.per_device_batch_size, self.accumulation_steps) < 1:
            raise ValueError(f"every part must be at least 1: {self}")
        if self.global_batch_size is None:
            object.__setattr__(self, "global_batch_size", self.num_places)
        if not 1 <= self.global_batch_size <= self.num_places:
            raise ValueError(f"a batch of {self.global_batch_size} has no room in {self.num_places} places")

    @property
    def num_places(self) -> int:
        """Packs that an optimizer step has room for."""
        return self.world_size * self.per_device_batch_size * self.accumulation_steps

    @classmethod
    def keeping(cls, global_batch_size: int, world_size: int, most_per_device: int) -> Split:
        """The split of a batch over other ranks that takes least time: fewest places a rank, then fewest micro-steps.

        Args:
            most_per_device: packs that a rank has memory for at once.
        """
        needed = math.ceil(global_batch_size / world_size)

        def cost(size: int) -> tuple[int, int]:
            steps = math.ceil(needed / size)
            return steps * size, steps

        size = min(range(1, min(most_per_device, needed) + 1), key=cost)
        return cls(world_size, size, math.ceil(needed / size), global_batch_size)

    def __str__(self) -> str:
        return f"{self.world_size} ranks x {self.per_device_batch_size} x {self.accumulation_steps} micro-steps"


@dataclass(frozen=True)
class Schedule:
    """Steps over epochs of packs. Rank-local arithmetic, the same on every rank.

    Args:
        num_packs: packs of an epoch.
        global_batch_size: packs of a step, the last of an epoch perhaps smaller.
        seed: of the order.
    """

    num_packs: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_packs < 1 or self.global_batch_size < 1:
            raise ValueError(f"nothing to schedule: {self}")

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps an epoch takes."""
        return math.ceil(self.num_packs / self.global_batch_size)

    def num_steps(self, num_epochs: float) -> int:
        """Optimizer steps that so many epochs take, at least one; a part of an epoch is rounded up to whole steps."""
        # 0.07 * 100 is a little more than 7 in floats: a product's last bits must not cost a step.
        return max(1, math.ceil(round(num_epochs * self.num_steps_per_epoch, 6)))

    def batch_at(self, position: Position) -> GlobalBatch:
        """The batch that starts at a position."""
        epoch, start = divmod(position.global_index, self.num_packs)
        return GlobalBatch(epoch, start, min(start + self.global_batch_size, self.num_packs))

    def position_after(self, batch: GlobalBatch) -> Position:
        """The position when a batch was taken."""
        return Position(batch.epoch * self.num_packs + batch.stop)

    def position_of_step(self, step: int) -> Position:
        """The position before optimizer step `step`, counted from 0."""
        epoch, in_epoch = divmod(step, self.num_steps_per_epoch)
        return Position(epoch * self.num_packs + in_epoch * self.global_batch_size)

    def step_at(self, position: Position) -> int:
        """The inverse of `position_of_step`.

        Raises:
            ValueError: the position is not at the start of a step, so it belongs to another global batch size.
        """
        epoch, start = divmod(position.global_index, self.num_packs)
        in_epoch, rest = divmod(start, self.global_batch_size)
        if rest:
            raise ValueError(f"pack {position.global_index} does not start a batch of {self.global_batch_size}")
        return epoch * self.num_steps_per_epoch + in_epoch

    def epochs_at(self, position: Position) -> float:
        """Epochs done at a position."""
        return position.global_index / self.num_packs

    def packs_of(self, batch: GlobalBatch) -> list[int]:
        """The pack numbers of a whole batch, in order."""
        packs: list[int] = permutation(self.num_packs, self.seed, batch.epoch)[batch.start : batch.stop].tolist()
        return packs

    def packs_for(self, batch: GlobalBatch, micro_step: int, rank: int, split: Split) -> list[int]:
        """The pack numbers of one rank's micro-step; fewer, or none, towards the end of an epoch's last batch.

        Place `(micro_step * world_size + rank) * per_device_batch_size + b` of the batch is the micro-step's b-th row,
        so micro-steps fill up one after another over all ranks, whatever the split.
        """
        if split.global_batch_size != self.global_batch_size:
            raise ValueError(f"{split} does not make a batch of {self.global_batch_size}")
        if not (0 <= rank < split.world_size and 0 <= micro_step < split.accumulation_steps):
            raise ValueError(f"rank {rank}, micro-step {micro_step} of {split}")
        first = (micro_step * split.world_size + rank) * split.per_device_batch_size
        start = min(batch.start + first, batch.stop)
        stop = min(start + split.per_device_batch_size, batch.stop)
        packs: list[int] = permutation(self.num_packs, self.seed, batch.epoch)[start:stop].tolist()
        return packs
