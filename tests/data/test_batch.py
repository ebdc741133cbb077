"""Batches against targets made by hand, and against a loss computed document by document."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.batch import IGNORE, Batch, collate_packed, collate_padded, empty_batch

_ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=7).map(
        lambda row: (np.array([token for token, _ in row], np.int32), np.array([flag for _, flag in row], np.uint8))
    ),
    min_size=1,
    max_size=5,
)


def _pairs(rows: list[Any]) -> list[tuple[int, int]]:
    """(token, next token) for each target: by definition, over documents one at a time."""
    return [(int(ids[place - 1]), int(ids[place])) for ids, flags in rows for place in range(1, len(ids)) if flags[place]]


def _pairs_of(batch: Batch) -> list[tuple[int, int]]:
    chosen = batch.targets_BT != IGNORE
    return list(zip(batch.input_ids_BT[chosen].tolist(), batch.targets_BT[chosen].tolist(), strict=True))


@settings(max_examples=80, deadline=None)
@given(rows=_ROWS)
def test_both_forms_predict_each_target_from_the_token_before_it(rows: list[Any]) -> None:
    packed, padded = collate_packed(rows), collate_padded(rows, pad_token_id=3)
    for batch in (packed, padded):
        assert _pairs_of(batch) == _pairs(rows)
        assert batch.num_target_tokens == len(_pairs(rows))
        assert batch.num_tokens == sum(len(ids) for ids, _ in rows)
    assert packed.document_lengths == tuple(len(ids) for ids, _ in rows)
    assert packed.input_ids_BT[0].tolist() == [token for ids, _ in rows for token in ids]
    assert packed.position_ids_BT[0].tolist() == [place for ids, _ in rows for place in range(len(ids))]
    assert padded.attention_mask_BT is not None
    for index, (ids, _) in enumerate(rows):
        assert padded.input_ids_BT[index][padded.attention_mask_BT[index]].tolist() == ids.tolist()
        assert padded.position_ids_BT[index, : len(ids)].tolist() == list(range(len(ids)))
        assert (padded.input_ids_BT[index, len(ids) :] == 3).all()


def test_the_end_of_text_is_a_target_where_it_is_also_padding() -> None:
    end = 7
    rows = [(np.array([1, 2, end]), np.array([0, 1, 1])), (np.array([1, 2, 3, 4, end]), np.array([0, 0, 0, 1, 1]))]
    batch = collate_padded(rows, pad_token_id=end)
    assert batch.targets_BT.tolist() == [[2, end, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 4, end, IGNORE]]


def test_packed_documents_do_not_predict_each_other() -> None:
    """A bigram model's loss over the packed row is the sum of its losses over the documents."""
    torch.manual_seed(0)
    logits = torch.randn(10, 10, dtype=torch.float64)
    generator = np.random.default_rng(0)
    rows = [(generator.integers(0, 10, size=length), np.ones(length, np.uint8)) for length in (5, 1, 2, 9)]

    def loss(batch: Batch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits[batch.input_ids_BT].flatten(0, 1), batch.targets_BT.flatten(), reduction="sum", ignore_index=IGNORE
        )

    apart = sum(-logits.log_softmax(-1)[ids[:-1], ids[1:]].sum() for ids, _ in rows)
    torch.testing.assert_close(loss(collate_packed(rows)), apart)
    torch.testing.assert_close(loss(collate_padded(rows, 0)), apart)


@pytest.mark.parametrize("is_packed", [True, False])
def test_an_empty_batch_counts_nothing_and_is_a_batch(is_packed: bool) -> None:
    batch = empty_batch(5, is_packed=is_packed)
    assert batch.is_empty
    assert (batch.num_tokens, batch.num_target_tokens) == (0, 0)
    assert (batch.targets_BT == IGNORE).all()
    assert (batch.input_ids_BT == 5).all()
    assert batch.input_ids_BT.numel() > 0
    assert (batch.document_lengths is None) != is_packed


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_batch_can_be_pickled_and_moved(is_packed: bool) -> None:
    rows = [(np.array([1, 2, 3]), np.array([0, 1, 1])), (np.array([4, 5]), np.array([0, 1]))]
    batch = collate_packed(rows) if is_packed else collate_padded(rows, 0)
    for copy in (pickle.loads(pickle.dumps(batch)), batch.to("cpu"), batch.to("meta")):
        for name in ("input_ids_BT", "position_ids_BT", "targets_BT", "attention_mask_BT"):
            before, after = getattr(batch, name), getattr(copy, name)
            assert (before is None) == (after is None)
            if before is not None:
                assert after.shape == before.shape
                assert after.device.type == "meta" or torch.equal(after, before)
        assert copy.document_lengths == batch.document_lengths
        assert (copy.num_tokens, copy.num_target_tokens) == (5, 3)


def _packed() -> Batch:
    return collate_packed([(np.array([1, 2, 3]), np.array([0, 1, 1])), (np.array([4, 5]), np.array([0, 1]))])


def _padded() -> Batch:
    return collate_padded([(np.array([1, 2, 3]), np.array([0, 1, 1])), (np.array([4, 5]), np.array([0, 1]))], 0)


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (_packed, {"input_ids_BT": torch.zeros(1, 5)}, "int64"),
        (_packed, {"targets_BT": torch.zeros(1, 4, dtype=torch.int64)}, "targets_BT is"),
        (_packed, {"document_lengths": None}, "packed .* or padded"),
        (_packed, {"attention_mask_BT": torch.ones(1, 5, dtype=torch.bool)}, "packed .* or padded"),
        (_packed, {"document_lengths": (3, 1)}, "documents of"),
        (_packed, {"document_lengths": (5, 0)}, "documents of"),
        (_packed, {"document_lengths": (2, 3)}, "last token or padding has a target"),
        (_packed, {"position_ids_BT": torch.arange(5)[None]}, "restart"),
        (_packed, {"num_tokens": 4}, "5 tokens, said to be 4"),
        (_packed, {"num_target_tokens": 2}, "3 targets, said to be 2"),
        (_packed, {"num_tokens": 0}, "an empty batch with 3 targets"),
        (_packed, {"targets_BT": torch.full((1, 5), 2), "num_target_tokens": 5}, "last token"),
        (_padded, {"attention_mask_BT": torch.ones(2, 3)}, "bool"),
        (_padded, {"attention_mask_BT": torch.tensor([[True] * 3, [False, True, True]])}, "on the right"),
        (_padded, {"attention_mask_BT": torch.tensor([[True] * 3, [False] * 3])}, "on the right"),
        (_padded, {"targets_BT": torch.tensor([[2, 3, 1], [5, 0, 0]]), "num_target_tokens": 6}, "padding has a target"),
        (_padded, {"position_ids_BT": torch.ones(2, 3, dtype=torch.int64)}, "restart"),
        (_padded, {"num_tokens": 6}, "5 tokens, said to be 6"),
    ],
)
def test_a_batch_checks_itself(make: Any, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(make(), **change)
