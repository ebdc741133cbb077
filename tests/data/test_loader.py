"""What ranks get in training and evaluation, put together again."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.config.schema import DataConfig
from qlora.data.batch import IGNORE, Batch
from qlora.data.loader import EvalLoader, StepBatches, TrainLoader, plan_packs
from qlora.data.packing import one_document_a_pack
from qlora.data.sampler import Position, Split
from qlora.data.token_store import TokenizedDataset, TokenWriter, open_store

_NUM_ROWS = 23
_MAX_LENGTH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenizedDataset:
    """Rows whose tokens tell the row: row i is all tokens i + 100."""
    folder = tmp_path_factory.mktemp("store")
    generator = np.random.default_rng(0)
    with TokenWriter(folder) as writer:
        for row in range(_NUM_ROWS):
            length = int(generator.integers(2, _MAX_LENGTH + 1))
            writer.add([row + 100] * length, [False, True, *(generator.random(length - 2) < 0.5)])
        writer.finish("f", {})
    found = open_store(Path(folder), "f")
    assert found is not None
    return found


def _rows_of(batch: Batch) -> list[int]:
    """The rows in a batch, told by their tokens; empty batches have none."""
    if batch.is_empty:
        return []
    if batch.document_lengths is not None:
        ends = np.cumsum(batch.document_lengths)
        return [int(batch.input_ids_BT[0, end - 1]) - 100 for end in ends]
    return [int(row[0]) - 100 for row in batch.input_ids_BT]


def _loader(dataset: TokenizedDataset, split: Split, rank: int, *, packing: bool) -> TrainLoader:
    plan = plan_packs(dataset, DataConfig(packing=packing, max_length=_MAX_LENGTH), seed=3)
    return TrainLoader(dataset, plan, split=split, rank=rank, seed=3, pad_token_id=0)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("split", [Split(1, 1, 6), Split(2, 1, 3), Split(3, 2, 1), Split(6, 1, 1), Split(1, 6, 1)])
def test_an_epoch_over_all_ranks_is_every_row_once_whatever_the_split(dataset, split: Split, packing: bool) -> None:
    loaders = [_loader(dataset, split, rank, packing=packing) for rank in range(split.world_size)]
    reference = _loader(dataset, Split(1, 6, 1), 0, packing=packing)
    num_steps = loaders[0].num_steps_per_epoch
    steps = [list(islice(loader.batches(Position(0)), num_steps)) for loader in loaders]
    seen: Counter[int] = Counter()
    for in_epoch, wanted in enumerate(islice(reference.batches(Position(0)), num_steps)):
        here = [rank_steps[in_epoch] for rank_steps in steps]
        batches = [batch for step in here for batch in step.micro_batches]
        rows = [row for batch in batches for row in _rows_of(batch)]
        assert sorted(rows) == sorted(row for batch in wanted.micro_batches for row in _rows_of(batch))
        seen.update(rows)
        for step in here:
            assert len(step.micro_batches) == split.accumulation_steps
            assert step.global_num_tokens == sum(batch.num_tokens for batch in batches)
            assert step.global_num_target_tokens == sum(batch.num_target_tokens for batch in batches)
            assert (step.step, step.epoch, step.position_after) == (in_epoch, wanted.epoch, wanted.position_after)
    assert seen == Counter(range(_NUM_ROWS))
    assert wanted.epoch == 1.0


def test_batches_go_on_from_any_position_over_the_end_of_an_epoch(dataset) -> None:
    def summary(step: StepBatches) -> tuple[object, ...]:
        return step.step, step.epoch, step.position_after, [_rows_of(batch) for batch in step.micro_batches]

    loader = _loader(dataset, Split(1, 2, 2), 0, packing=True)
    num_steps = 2 * loader.num_steps_per_epoch + 1
    whole = [summary(step) for step in islice(loader.batches(Position(0)), num_steps)]
    assert whole[-1][0] == num_steps - 1
    assert whole[0][3] != whole[loader.num_steps_per_epoch][3]
    for taken in range(1, num_steps):
        position = whole[taken - 1][2]
        assert isinstance(position, Position)
        resumed = _loader(dataset, Split(1, 2, 2), 0, packing=True)
        assert [summary(step) for step in islice(resumed.batches(position), num_steps - taken)] == whole[taken:]


def test_a_rank_without_packs_gets_empty_batches_of_the_same_form(dataset) -> None:
    for packing in (True, False):
        split = Split(64, 1, 2)
        step = next(_loader(dataset, split, 63, packing=packing).batches(Position(0)))
        assert [batch.is_empty for batch in step.micro_batches] == [True, True]
        assert step.global_num_target_tokens == dataset.num_target_tokens
        for batch in step.micro_batches:
            assert (batch.document_lengths is not None) == packing


def test_packed_rows_share_batches_and_padded_rows_do_not(dataset) -> None:
    packed = next(_loader(dataset, Split(1, 3, 1), 0, packing=True).batches(Position(0))).micro_batches[0]
    assert packed.document_lengths is not None
    assert len(packed.document_lengths) > 3
    assert packed.input_ids_BT.shape[1] <= 3 * _MAX_LENGTH
    padded = next(_loader(dataset, Split(1, 3, 1), 0, packing=False).batches(Position(0))).micro_batches[0]
    assert padded.input_ids_BT.shape[0] == 3


@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 9), per_device=st.integers(1, 5), packing=st.booleans())
def test_evaluation_sees_every_row_once_in_equally_many_batches(dataset, world_size, per_device, packing) -> None:
    plan = plan_packs(dataset, DataConfig(packing=packing, max_length=_MAX_LENGTH), seed=0)
    loaders = [
        EvalLoader(dataset, plan, per_device_batch_size=per_device, rank=rank, world_size=world_size, pad_token_id=0)
        for rank in range(world_size)
    ]
    batches = [list(loader) for loader in loaders]
    assert {len(rank_batches) for rank_batches in batches} == {len(loaders[0])}
    rows = [row for rank_batches in batches for batch in rank_batches for row in _rows_of(batch)]
    assert sorted(rows) == list(range(_NUM_ROWS))
    num_targets = sum(batch.num_target_tokens for rank_batches in batches for batch in rank_batches)
    assert num_targets == dataset.num_target_tokens
    # No batch of ranks is empty as a whole: nothing is run for nothing.
    assert not all(rank_batches[-1].is_empty for rank_batches in batches)


def test_targets_are_those_of_the_store(dataset) -> None:
    plan = plan_packs(dataset, DataConfig(packing=True, max_length=_MAX_LENGTH), seed=0)
    for batch in EvalLoader(dataset, plan, per_device_batch_size=2, rank=0, world_size=1, pad_token_id=0):
        start = 0
        assert batch.document_lengths is not None
        for row, length in zip(_rows_of(batch), batch.document_lengths, strict=True):
            flags = dataset.row(row)[1]
            has_target = (batch.targets_BT[0, start : start + length] != IGNORE).tolist()
            assert has_target == [*(flags[1:] != 0).tolist(), False]
            start += length


def test_a_plan_of_another_data_set_is_told(dataset) -> None:
    with pytest.raises(ValueError, match="a plan over 5 documents for 23 rows"):
        TrainLoader(dataset, one_document_a_pack(5), split=Split(1, 1, 1), rank=0, seed=0, pad_token_id=0)


def test_a_step_checks_itself() -> None:
    with pytest.raises(ValueError, match="without micro-batches"):
        StepBatches(0, 0.0, (), Position(1), 5, 3)
