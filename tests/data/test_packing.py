"""Plans hold every document once, fit, and are as full as best fit makes them."""

from __future__ import annotations

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.packing import PackPlan, one_document_a_pack, pack


def _plain_best_fit(lengths: list[int], order: list[int], max_length: int) -> list[list[int]]:
    """Best fit as in a textbook, with a sorted list of (room, -age)."""
    rooms: list[tuple[int, int, int]] = []
    packs: list[list[int]] = []
    for turn, document in enumerate(order):
        at = bisect.bisect_left(rooms, (lengths[document], -turn - 1, -1))
        if at == len(rooms):
            room, number = max_length, len(packs)
            packs.append([])
        else:
            room, _, number = rooms.pop(at)
        packs[number].append(document)
        if room > lengths[document]:
            bisect.insort(rooms, (room - lengths[document], -turn, number))
    return packs


@settings(max_examples=150, deadline=None)
@given(data=st.data(), max_length=st.sampled_from([1, 7, 64, 1023, 1024, 1025, 5000]), seed=st.integers(0, 2**32))
def test_it_is_best_fit_and_no_document_is_lost_or_doubled(data, max_length: int, seed: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, max_length), min_size=1, max_size=60))
    plan = pack(lengths, max_length, seed)
    packs = [plan[number].tolist() for number in range(len(plan))]
    assert sorted(document for documents in packs for document in documents) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in documents) <= max_length for documents in packs)
    # Each document is first seen in the order of the plan's own permutation: rebuild that order from a plan of packs
    # that hold one document each, where packs stand in the order documents came.
    order = pack([max_length] * len(lengths), max_length, seed).documents.tolist()
    assert packs == _plain_best_fit(lengths, order, max_length)


def test_plans_depend_on_the_seed_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=500)
    one, again, other = pack(lengths, 128, 1), pack(lengths.tolist(), 128, 1), pack(lengths, 128, 2)
    assert one.hash == again.hash != other.hash
    assert np.array_equal(one.documents, again.documents)


def test_packs_are_nearly_full_for_usual_lengths() -> None:
    """Waste is bounded below by zero; first-fit-like packing in random order stays within a few percent of that."""
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(5, 1, size=5000).astype(int) + 1)
    plan = pack(lengths, 2048, 0)
    assert lengths.sum() / (len(plan) * 2048) > 0.97


def test_without_packing_each_pack_is_its_document() -> None:
    plan = one_document_a_pack(3)
    assert not plan.is_packed
    assert [plan[number].tolist() for number in range(len(plan))] == [[0], [1], [2]]
    assert plan.hash != pack([1, 1, 1], 1, 0).hash
    with pytest.raises(IndexError):
        plan[3]


@pytest.mark.parametrize("lengths", [[], [0], [9]])
def test_documents_must_fit(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        pack(lengths, 8, 0)


@pytest.mark.parametrize(
    ("documents", "offsets", "reason"),
    [([0, 0], [0, 1, 2], "doubled"), ([0, 2], [0, 1, 2], "lost"), ([0, 1], [0, 0, 2], "without"), ([0, 1], [0, 1], "of 2")],
)
def test_a_plan_checks_itself(documents: list[int], offsets: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PackPlan(np.array(documents), np.array(offsets), is_packed=True)
