"""A run that is stopped and goes on, again and again, on other ranks: it takes the packs of the run that never stopped.

First the arithmetic alone (`sampler.py`), then the whole way: rows of several files, tokenized, cut, packed, shuffled and
handed out, and at the end counted by what their tokens say.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.assets import tiny_path
from qlora.config.schema import DataConfig
from qlora.data.batch import IGNORE, Batch
from qlora.data.loader import StepBatches, TrainLoader, plan_packs
from qlora.data.packing import PackPlan
from qlora.data.prepare import prepare
from qlora.data.sampler import Position, Schedule, Split
from qlora.data.token_store import TokenizedDataset
from qlora.data.tokenizer import load_tokenizer

# Ranks, packs that a rank has room for at once, and steps until the stop.
Leg = tuple[int, int, int]
LEGS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(num_packs=st.integers(1, 60), global_batch_size=st.integers(1, 40), seed=st.integers(0, 2**63), legs=LEGS)
def test_stops_and_other_ranks_leave_every_step_its_packs(
    num_packs: int, global_batch_size: int, seed: int, legs: list[Leg]
) -> None:
    schedule = Schedule(num_packs, global_batch_size, seed)
    legs = [*legs, (2, 3, 2 * schedule.num_steps_per_epoch)]  # however the legs fell, two whole epochs are behind it
    steps: list[list[int]] = []
    position = Position(0)
    for world_size, most_per_device, num_steps in legs:
        split = Split.keeping(global_batch_size, world_size, most_per_device)
        # All that a checkpoint keeps of a place is this number; the schedule is made anew.
        schedule, position = Schedule(num_packs, split.global_batch_size, seed), Position(int(position.global_index))
        assert schedule.step_at(position) == len(steps)
        for _ in range(num_steps):
            batch = schedule.batch_at(position)
            handed = [schedule.packs_for(batch, *at, split) for at in places_of(split)]
            assert max(map(len, handed)) <= min(most_per_device, split.per_device_batch_size)
            steps.append([number for packs in handed for number in packs])
            position = schedule.position_after(batch)
    assert steps == uninterrupted(Schedule(num_packs, global_batch_size, seed), len(steps))
    per_epoch = schedule.num_steps_per_epoch
    for first in range(0, len(steps) - per_epoch + 1, per_epoch):
        taken = [number for step in steps[first : first + per_epoch] for number in step]
        assert sorted(taken) == list(range(num_packs))


@settings(max_examples=200, deadline=None)
@given(
    global_batch_size=st.integers(1, 60),
    world_size=st.integers(1, 9),
    per_device=st.integers(1, 9),
    accumulation=st.integers(1, 30),
    num_packs=st.integers(1, 80),
)
def test_places_that_a_batch_does_not_fill_stay_empty(
    global_batch_size: int, world_size: int, per_device: int, accumulation: int, num_packs: int
) -> None:
    """However much more room than batch there is: ranks fill up in order, and nothing of the next batch is taken."""
    places = world_size * per_device * accumulation
    if global_batch_size > places:
        with pytest.raises(ValueError, match="has no room in"):
            Split(world_size, per_device, accumulation, global_batch_size)
        return
    split = Split(world_size, per_device, accumulation, global_batch_size)
    schedule = Schedule(num_packs, global_batch_size, seed=0)
    for step in range(schedule.num_steps_per_epoch):
        batch = schedule.batch_at(schedule.position_of_step(step))
        handed = [schedule.packs_for(batch, *at, split) for at in places_of(split)]
        assert [number for packs in handed for number in packs] == schedule.packs_of(batch)
        full, rest = divmod(len(batch), per_device)
        wanted = [per_device] * full + [rest] * (rest > 0)
        assert list(map(len, handed)) == wanted + [0] * (len(handed) - len(wanted))


@given(global_batch_size=st.integers(1, 200), world_size=st.integers(1, 17), most_per_device=st.integers(1, 12))
def test_the_split_that_keeps_a_batch_wastes_least(global_batch_size: int, world_size: int, most_per_device: int) -> None:
    """Against all splits there are: none with room for the batch has fewer places a rank, or as many in fewer steps."""
    split = Split.keeping(global_batch_size, world_size, most_per_device)
    assert (split.world_size, split.global_batch_size) == (world_size, global_batch_size)
    assert split.per_device_batch_size <= most_per_device
    enough = [
        (size * math.ceil(global_batch_size / (world_size * size)), math.ceil(global_batch_size / (world_size * size)))
        for size in range(1, most_per_device + 1)
    ]
    assert (split.per_device_batch_size * split.accumulation_steps, split.accumulation_steps) == min(enough)


def places_of(split: Split) -> list[tuple[int, int]]:
    """(micro-step, rank), in the order in which a batch fills them."""
    return [(micro, rank) for micro in range(split.accumulation_steps) for rank in range(split.world_size)]


def uninterrupted(schedule: Schedule, num_steps: int) -> list[list[int]]:
    """The packs of so many steps of a run that is never stopped."""
    position, steps = Position(0), []
    for _ in range(num_steps):
        batch = schedule.batch_at(position)
        steps.append(schedule.packs_of(batch))
        position = schedule.position_after(batch)
    return steps


# The whole way

_MAX_LENGTH = 64
_TOO_LONG = range(5)  # of file b: these are cut into several rows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of unequal size, one of them JSON; each answer names its file and row."""
    folder = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    paths = []
    for name, num_rows in (("a.jsonl", 31), ("b.jsonl", 23), ("c.json", 9)):
        rows = []
        for number in range(num_rows):
            tag = f"{name[0]}{number}"
            words = 37 if name[0] == "b" and number in _TOO_LONG else int(draw.integers(1, 5))
            rows.append({"prompt": f"row {tag}", "completion": " ".join(f"{tag} at {n}" for n in range(words))})
        path = folder / name
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(f"{json.dumps(row)}\n" for row in rows))
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def opened(files: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[TokenizedDataset, PackPlan]]:
    """Token rows and plan, packed and not, as a job would have them."""
    found = {}
    for packing in (True, False):
        config = DataConfig(
            train=[str(path) for path in files],
            max_length=_MAX_LENGTH,
            over_long="split",
            packing=packing,
            cache_dir=str(tmp_path_factory.mktemp("cache")),
        )
        rows = prepare(config.train, load_tokenizer(str(tiny_path())), config)
        found[packing] = rows, plan_packs(rows, config, seed=5)
    return found


def test_the_rows_are_what_is_to_be_counted(
    files: Sequence[Path], opened: dict[bool, tuple[TokenizedDataset, PackPlan]]
) -> None:
    """What the count stands on: every record of every file is there, some in several rows, and packs mix them."""
    rows, plan = opened[True]
    tokenizer = load_tokenizer(str(tiny_path()))
    texts = [tokenizer.decode(rows.row(number)[0]) for number in range(len(rows))]
    tags = {f"{path.stem}{number}" for path, size in zip(files, (31, 23, 9), strict=True) for number in range(size)}
    words = [set(text.replace("<|im_end|>", " ").split()) for text in texts]
    assert {tag for tag in tags if any(tag in found for found in words)} == tags
    assert rows.statistics.num_split == len(_TOO_LONG)
    assert len(tags) == rows.statistics.num_records < len(rows)
    files_of = [{word[0] for row in plan[number] for word in words[row] & tags} for number in range(len(plan))]
    assert sum(len(found) > 1 for found in files_of) > 5


@settings(max_examples=25, deadline=None)
@given(
    packing=st.booleans(),
    global_batch_size=st.integers(1, 14),
    legs=LEGS.filter(lambda legs: len(legs) > 1),
    seed=st.integers(0, 9),
)
def test_every_row_is_handed_out_once_an_epoch_over_stops_and_worlds(
    opened: dict[bool, tuple[TokenizedDataset, PackPlan]], packing: bool, global_batch_size: int, legs: list[Leg], seed: int
) -> None:
    """Rows are told by their tokens and targets, as they arrive in the batches of all ranks."""
    dataset, plan = opened[packing]
    known = {_key(*dataset.row(number)): number for number in range(len(dataset))}
    assert len(known) == len(dataset)
    num_steps = math.ceil(len(plan) / global_batch_size)
    steps: list[Counter[int]] = []
    position = Position(0)
    for world_size, most_per_device, leg_steps in [*legs, (3, 2, num_steps)]:
        split = Split.keeping(global_batch_size, world_size, most_per_device)
        ranks = [TrainLoader(dataset, plan, split=split, rank=rank, seed=seed, pad_token_id=0) for rank in range(world_size)]
        for of_ranks in islice(zip(*(loader.batches(position) for loader in ranks), strict=True), leg_steps):
            steps.append(_rows_of(of_ranks, known))
            position = of_ranks[0].position_after
    alone = TrainLoader(dataset, plan, split=Split(1, global_batch_size, 1), rank=0, seed=seed, pad_token_id=0)
    assert steps == [_rows_of((step,), known) for step in islice(alone.batches(Position(0)), len(steps))]
    for first in range(0, len(steps) - num_steps + 1, num_steps):
        assert sum(steps[first : first + num_steps], Counter()) == Counter(range(len(dataset)))


def _rows_of(of_ranks: Sequence[StepBatches], known: dict[bytes, int]) -> Counter[int]:
    """The numbers of the rows that all ranks get in one step, which agree on everything but these."""
    batches = [batch for step in of_ranks for batch in step.micro_batches]
    assert len({(step.step, step.epoch, step.position_after, step.global_num_tokens) for step in of_ranks}) == 1
    assert len({len(step.micro_batches) for step in of_ranks}) == 1
    assert sum(batch.num_tokens for batch in batches) == of_ranks[0].global_num_tokens
    assert sum(batch.num_target_tokens for batch in batches) == of_ranks[0].global_num_target_tokens
    return Counter(known[key] for batch in batches for key in _keys_in(batch))


def _keys_in(batch: Batch) -> Iterator[bytes]:
    """One key for each document of a batch."""
    if batch.is_empty:
        return
    if batch.document_lengths is not None:
        ends = np.cumsum(batch.document_lengths)
        spans = [(0, int(end) - length, int(end)) for end, length in zip(ends, batch.document_lengths, strict=True)]
    else:
        assert batch.attention_mask_BT is not None
        spans = [(row, 0, int(length)) for row, length in enumerate(batch.attention_mask_BT.sum(1))]
    for row, start, stop in spans:
        flags = batch.targets_BT[row, start : stop - 1] != IGNORE  # targets are shifted: the first token is never one
        yield _key(batch.input_ids_BT[row, start:stop].numpy(), np.array([False, *flags.tolist()]))


def _key(tokens: np.ndarray, is_target: np.ndarray) -> bytes:
    return tokens.astype(np.int64).tobytes() + is_target.astype(bool).tobytes()
