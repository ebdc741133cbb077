"""Hands each rank its batches: the micro-batches of an optimizer step in training, a fixed number in evaluation.

No process, thread or state is behind it: rows are views of mapped files, and what comes next follows from a `Position`.
Every rank gets the same number of batches, empty ones where its packs are used up, so that collectives always meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qlora.config.schema import DataConfig
from qlora.data.batch import Batch, collate_packed, collate_padded, empty_batch
from qlora.data.packing import PackPlan, one_document_a_pack, pack
from qlora.data.sampler import Position, Schedule, Split
from qlora.data.token_store import TokenizedDataset


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step's work for one rank.

    Args:
        step: the step, from 0, counted from the start of training.
        epoch: epochs done when the step is done.
        micro_batches: one a micro-step, some of them perhaps empty.
        position_after: where the data stands when the step is done.
        global_num_tokens: tokens of the step over all ranks and micro-steps; the same on every rank, with no collective.
        global_num_target_tokens: targets of the step over all ranks and micro-steps; likewise.
    """

    step: int
    epoch: float
    micro_batches: tuple[Batch, ...]
    position_after: Position
    global_num_tokens: int
    global_num_target_tokens: int

    def to(self, device: torch.device) -> StepBatches:
        """With the batches on a device; a GPU copies them when it comes to them, and nobody waits."""
        return replace(self, micro_batches=tuple(batch.to(device) for batch in self.micro_batches))

    def __post_init__(self) -> None:
        if not self.micro_batches:
            raise ValueError(f"step {self.step} without micro-batches")
        own_targets = sum(batch.num_target_tokens for batch in self.micro_batches)
        if not max(1, own_targets) <= self.global_num_target_tokens < self.global_num_tokens:
            raise ValueError(
                f"step {self.step}: {own_targets} targets here, {self.global_num_target_tokens} of "
                f"{self.global_num_tokens} tokens over all ranks"
            )


def plan_packs(dataset: TokenizedDataset, config: DataConfig, seed: int) -> PackPlan:
    """The packs of a data set, as `data.packing` and `data.max_length` have it. Rank-local, the same on every rank."""
    if config.packing:
        return pack(dataset.lengths, config.max_length, seed)
    return one_document_a_pack(len(dataset))


class TrainLoader:
    """Training batches of one rank, from any position on. Rank-local.

    Args:
        dataset: the token rows.
        plan: the packs, over all of the data set's rows.
        split: how a global batch is shared out.
        rank: of this process.
        seed: of the order.
        pad_token_id: fills padding and empty batches.
    """

    def __init__(
        self, dataset: TokenizedDataset, plan: PackPlan, *, split: Split, rank: int, seed: int, pad_token_id: int
    ) -> None:
        self.schedule = Schedule(len(plan), split.global_batch_size, seed)
        self._rows = _PackRows(dataset, plan, pad_token_id)
        self._split = split
        self._rank = rank

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps an epoch takes."""
        return self.schedule.num_steps_per_epoch

    def batches(self, position: Position) -> Iterator[StepBatches]:
        """Yield step after step from a position on, without end: the caller knows when training is over.

        Raises:
            ValueError: the position is not at the start of a step of this global batch size.
        """
        while True:
            step = self.schedule.step_at(position)
            batch = self.schedule.batch_at(position)
            micro_batches = tuple(
                self._rows.batch(self.schedule.packs_for(batch, micro_step, self._rank, self._split))
                for micro_step in range(self._split.accumulation_steps)
            )
            position = self.schedule.position_after(batch)
            num_tokens, num_target_tokens = self._rows.counts(self.schedule.packs_of(batch))
            yield StepBatches(
                step, self.schedule.epochs_at(position), micro_batches, position, num_tokens, num_target_tokens
            )

    def rows_at(self, position: Position, micro_step: int, rank: int) -> list[tuple[int, list[int]]]:
        """The token rows of one micro-step of any rank, in the step that starts at a position: number and token ids."""
        batch = self.schedule.batch_at(position)
        return self._rows.documents(self.schedule.packs_for(batch, micro_step, rank, self._split))


class EvalLoader:
    """Evaluation batches of one rank: every pack once over all ranks, the same number of batches on each. Rank-local.

    Args:
        dataset: the token rows.
        plan: the packs, over all of the data set's rows.
        per_device_batch_size: packs of a batch.
        rank, world_size: of this process, and how many there are.
        pad_token_id: fills padding and empty batches.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        plan: PackPlan,
        *,
        per_device_batch_size: int,
        rank: int,
        world_size: int,
        pad_token_id: int,
    ) -> None:
        if per_device_batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} with {per_device_batch_size} packs a batch")
        self._rows = _PackRows(dataset, plan, pad_token_id)
        self._num_packs = len(plan)
        self._batch_size = per_device_batch_size
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return math.ceil(self._num_packs / (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            start = (index * self._world_size + self._rank) * self._batch_size
            yield self._rows.batch(range(min(start, self._num_packs), min(start + self._batch_size, self._num_packs)))


class _PackRows:
    """Collates packs by number."""

    def __init__(self, dataset: TokenizedDataset, plan: PackPlan, pad_token_id: int) -> None:
        if len(plan.documents) != len(dataset):
            raise ValueError(f"a plan over {len(plan.documents)} documents for {len(dataset)} rows")
        self._dataset = dataset
        self._plan = plan
        self._pad_token_id = pad_token_id

    def batch(self, packs: Sequence[int]) -> Batch:
        rows = [[self._dataset.row(int(document)) for document in self._plan[number]] for number in packs]
        documents = [document for own in rows for document in own]
        if not documents:
            return empty_batch(self._pad_token_id, is_packed=self._plan.is_packed)
        batch = collate_packed(documents) if self._plan.is_packed else collate_padded(documents, self._pad_token_id)
        lengths = (sum(len(input_ids) for input_ids, _ in own) for own in rows)
        return replace(batch, packs=tuple(zip(packs, lengths, strict=True)))

    def documents(self, packs: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Number and token ids of each document of packs."""
        numbers = [int(document) for number in packs for document in self._plan[number]]
        return [(number, self._dataset.row(number)[0].tolist()) for number in numbers]

    def counts(self, packs: Sequence[int]) -> tuple[int, int]:
        """Tokens and targets of packs, without reading a token."""
        documents = np.concatenate([self._plan[number] for number in packs])
        offsets = self._dataset.offsets
        num_tokens = int((offsets[documents + 1] - offsets[documents]).sum())
        return num_tokens, int(self._dataset.target_counts[documents].sum(dtype=np.int64))
