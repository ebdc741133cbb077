"""Which pairs count and what they say together, on a pair that was recorded (two layers, on a busy machine)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peers import pairs, quiet
from peers.rows import MEASURED, ROWS, share_gathered, share_of_product

Recorded = dict[str, Any]
Make = Callable[..., dict[str, Any]]


def test_order_is_a_b_b_a() -> None:
    assert [pairs.order(n, ("a", "b")) for n in range(4)] == [("a", "b"), ("b", "a"), ("a", "b"), ("b", "a")]


def test_the_recorded_pair_learned_the_same_and_does_not_count(recorded: Recorded) -> None:
    assert pairs.refusals(ROWS["packed"], recorded["arms"]) == []
    assert not recorded["quiet"]
    assert pairs.counted([recorded], ROWS["packed"]) == []


@pytest.mark.parametrize("arm", ["qlora", "trl"])
def test_a_gradient_of_zero_is_refused(recorded: Recorded, arm: str) -> None:
    arms = copy.deepcopy(recorded["arms"])
    arms[arm]["norms"][3] = 0.0
    (why,) = pairs.refusals(ROWS["packed"], arms)
    assert arm in why
    assert "gradient" in why
    del arms[arm]["norms"]
    assert pairs.refusals(ROWS["packed"], arms)


def test_losses_that_part_are_refused_at_the_step_where_they_do(recorded: Recorded) -> None:
    arms = copy.deepcopy(recorded["arms"])
    arms["qlora"]["losses"][4] *= 1.02
    (why,) = pairs.refusals(ROWS["packed"], arms)
    assert why.startswith("step 5:")
    # Where other rows make up a step, the loss before any update is what can be compared.
    assert pairs.refusals(ROWS["padded"], arms) == []
    arms["trl"]["losses"][0] *= 1.02
    assert len(pairs.refusals(ROWS["padded"], arms)) == 1
    del arms["trl"]["losses"][-1]
    assert "steps" in pairs.refusals(ROWS["packed"], arms)[0]
    # An evaluation has no gradient.
    evaluated = {"qlora": {"losses": [10.0]}, "trl": {"losses": [10.05]}}
    assert pairs.refusals(ROWS["eval"], evaluated) == []
    evaluated["trl"]["losses"] = [10.2]
    assert len(pairs.refusals(ROWS["eval"], evaluated)) == 1


def test_a_row_is_the_median_of_the_ratios_of_its_pairs(recorded: Recorded, record: Make) -> None:
    records = [record(ratio) for ratio in (1.9, 2.5, 2.0, 2.1, 1.0)]
    found = pairs.summarize(records, ROWS["packed"])
    assert found is not None
    assert (found.ratio, found.low, found.high) == pytest.approx((2.0, 1.9, 2.1))
    assert found.num_pairs == 5
    assert found.second == recorded["arms"]["trl"]["tokens_per_second"]


def test_what_does_not_count_is_left_out(record: Make) -> None:
    others = [
        record(9.0, others_share=0.2),
        record(9.0, refusals=["losses"]),
        record(9.0, layers=2),
        record(9.0, row="long2k"),
    ]
    four = [record() for _ in range(4)]
    assert pairs.summarize([*four, *others], ROWS["packed"]) is None
    found = pairs.summarize([*four, *others, record()], ROWS["packed"])
    assert found is not None
    assert found.ratio == pytest.approx(2.0)
    # Memory is not spoiled by other jobs.
    memory = replace(ROWS["memory"], metric="tokens_per_second")
    assert len(pairs.counted([record(others_share=0.2, row="memory")], memory)) == 1


def test_pairs_of_a_campaign_are_judged_alike_whenever_they_were_run(record: Make) -> None:
    """By the best rate of all and the widest limit of the campaign: not by what was known or asked for then."""
    slower = [record(product_rates=[4.0e11, 3.4e11, 4.0e11], most_below=0.1) for _ in range(4)]
    assert pairs.counted(slower, ROWS["packed"]) == []
    assert len(pairs.counted([*slower, record(most_below=0.2)], ROWS["packed"])) == 5
    better = record(product_rates=[4.4e11] * 3, campaign="2026-02-01")
    assert len(pairs.counted([*slower, record(most_below=0.2), better], ROWS["packed"])) == 2


def test_the_latest_campaign_that_is_whole_is_shown(record: Make) -> None:
    records = [record(2.0) for _ in range(5)] + [record(3.0, campaign="2026-02-01") for _ in range(5)]
    records += [record(4.0, campaign="2026-03-01") for _ in range(4)]
    found = pairs.summarize(records, ROWS["packed"])
    assert found is not None
    assert (found.campaign, found.ratio) == ("2026-02-01", pytest.approx(3.0))


def test_quiet_means_a_steady_product_and_no_others(recorded: Recorded) -> None:
    assert quiet.is_quiet([400.0, 395.0, 380.0], 400.0, 0.01)
    assert not quiet.is_quiet([400.0, 395.0, 350.0], 400.0, 0.01)
    assert not quiet.is_quiet([400.0, 395.0, 380.0], 400.0, 0.2)
    assert quiet.best_rate([recorded], recorded["machine"]) == max(recorded["product_rates"])
    assert quiet.best_rate([recorded], "another") == 0


def test_derived_rows_read_other_rows_pairs(record: Make) -> None:
    one = record()
    one["arms"]["qlora"]["step_seconds"] = 0.5
    share, whole = share_of_product(one | {"step_flop": 1e11, "product_rates": [3e11, 4e11]})
    assert (share, whole) == (pytest.approx(0.5), 1.0)
    weights = 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # of two layers
    arms = {"two ranks, zero3": {"gathered_bytes": weights * 1.0}, "one process": {}}
    first, second = share_gathered({"arms": arms, "layers": 2})
    assert first / second == pytest.approx(0.25)
    assert all(row.source in MEASURED for row in ROWS.values() if row.source)


def test_lines_can_be_added_and_read(record: Make, tmp_path: Path) -> None:
    path = tmp_path / "raw" / "pairs.jsonl"
    assert pairs.read(path) == []
    pairs.append(path, record())
    pairs.append(path, record(3.0))
    assert pairs.read(path) == [record(), record(3.0)]
