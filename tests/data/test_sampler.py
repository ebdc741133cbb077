"""The order of the data: every pack once an epoch, for every way to share a global batch out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.sampler import GlobalBatch, Position, Schedule, Split, permutation


def _splits(product: int) -> list[Split]:
    divisors = [number for number in range(1, product + 1) if product % number == 0]
    return [
        Split(world_size, per_device, product // (world_size * per_device))
        for world_size in divisors
        for per_device in divisors
        if product % (world_size * per_device) == 0
    ]


@settings(max_examples=80, deadline=None)
@given(
    num_packs=st.integers(1, 60), global_batch_size=st.integers(1, 24), seed=st.integers(0, 2**63), epoch=st.integers(0, 3)
)
def test_every_split_takes_the_same_packs_a_step_and_each_pack_once_an_epoch(
    num_packs: int, global_batch_size: int, seed: int, epoch: int
) -> None:
    schedule = Schedule(num_packs, global_batch_size, seed)
    position = Position(epoch * num_packs)
    taken: list[int] = []
    for in_epoch in range(schedule.num_steps_per_epoch):
        batch = schedule.batch_at(position)
        assert schedule.step_at(position) == epoch * schedule.num_steps_per_epoch + in_epoch
        assert schedule.position_of_step(schedule.step_at(position)) == position
        whole = schedule.packs_of(batch)
        assert len(whole) == len(batch) <= global_batch_size
        for split in _splits(global_batch_size):
            # In the order that the formula numbers the places, so that the order is the same for every split as well.
            shared = [
                number
                for micro_step in range(split.accumulation_steps)
                for rank in range(split.world_size)
                for number in schedule.packs_for(batch, micro_step, rank, split)
            ]
            assert shared == whole
        taken += whole
        position = schedule.position_after(batch)
    assert sorted(taken) == list(range(num_packs))
    assert position == Position((epoch + 1) * num_packs)


def test_the_place_in_a_batch_is_the_documented_one() -> None:
    schedule, split = Schedule(100, 24, 5), Split(world_size=3, per_device_batch_size=2, accumulation_steps=4)
    batch = schedule.batch_at(Position(24))
    order = permutation(100, 5, 0)
    for micro_step in range(4):
        for rank in range(3):
            places = [24 + (micro_step * 3 + rank) * 2 + row for row in range(2)]
            assert schedule.packs_for(batch, micro_step, rank, split) == order[places].tolist()


def test_the_last_batch_is_smaller_and_leaves_some_ranks_without_packs() -> None:
    schedule, split = Schedule(10, 8, 0), Split(4, 1, 2)
    batch = schedule.batch_at(Position(8))
    assert batch == GlobalBatch(0, 8, 10)
    assert [len(schedule.packs_for(batch, 0, rank, split)) for rank in range(4)] == [1, 1, 0, 0]
    assert [len(schedule.packs_for(batch, 1, rank, split)) for rank in range(4)] == [0, 0, 0, 0]


@given(size=st.integers(0, 200), seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**64 - 1))
def test_a_permutation_is_one(size: int, seed: int, stream: int) -> None:
    assert sorted(permutation(size, seed, stream).tolist()) == list(range(size))


def test_permutations_differ_by_seed_and_epoch_and_do_not_remember() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    before = permutation(50, 3, 2).copy()
    permutation.cache_clear()
    assert np.array_equal(permutation(50, 3, 2), before)
    remembered = permutation(50, 3, 2)
    with pytest.raises(ValueError, match="read-only"):
        remembered[0] = 1


def test_a_permutation_is_fair() -> None:
    """Each item comes first equally often: a chi-squared statistic over 5 items and 2000 seeds, 4 degrees of freedom."""
    firsts = np.bincount([permutation(5, seed, 0)[0] for seed in range(2000)], minlength=5)
    assert ((firsts - 400) ** 2 / 400).sum() < 23.5  # exceeded with probability 1e-4


def test_the_order_is_the_one_philox_gives_by_its_definition() -> None:
    """The raw 64-bit output of Philox4x64-10 for key (seed, stream), counter from 1, as NumPy documents the generator."""

    def philox(counter: int, key: tuple[int, int]) -> list[int]:
        mask, words, keys = 2**64 - 1, [counter, 0, 0, 0], list(key)
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * words[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * words[2], 2**64)
            words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
            keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
        return words

    output = [word for counter in range(1, 5) for word in philox(counter, (7, 3))]
    assert permutation(16, 7, 3).tolist() == sorted(range(16), key=output.__getitem__)


@pytest.mark.parametrize(("num_epochs", "expected"), [(1, 4), (1.0, 4), (0.5, 2), (0.3, 2), (2.25, 9), (0.001, 1), (3, 12)])
def test_epochs_become_steps(num_epochs: float, expected: int) -> None:
    assert Schedule(10, 3, 0).num_steps(num_epochs) == expected


def test_a_share_of_an_epoch_is_not_rounded_up_by_the_last_bits_of_a_float() -> None:
    assert 0.07 * 100 > 7
    assert Schedule(100, 1, 0).num_steps(0.07) == 7
    assert Schedule(30, 1, 0).epochs_at(Position(45)) == 1.5


def test_a_position_of_another_batch_size_is_told() -> None:
    with pytest.raises(ValueError, match="does not start a batch of 4"):
        Schedule(10, 4, 0).step_at(Position(6))


def test_a_split_of_another_batch_size_is_told() -> None:
    schedule = Schedule(10, 4, 0)
    batch = schedule.batch_at(Position(0))
    with pytest.raises(ValueError, match="does not make a batch of 4"):
        schedule.packs_for(batch, 0, 0, Split(3, 1, 1))
    with pytest.raises(ValueError, match="rank 2"):
        schedule.packs_for(batch, 0, 2, Split(2, 2, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Position(-1),
        lambda: GlobalBatch(0, 3, 3),
        lambda: Split(0, 1, 1),
        lambda: Schedule(0, 1, 0),
        lambda: permutation(3, -1, 0),
    ],
)
def test_types_check_themselves(make) -> None:
    with pytest.raises(ValueError, match=r"."):
        make()
