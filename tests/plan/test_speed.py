"""The model of a step's time: its arithmetic and bytes are the plan's, its overlap that of a flow shop of two machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora.assets import tiny_path
from qlora.config.schema import JobConfig
from qlora.plan.gathers import gathered_bytes
from qlora.plan.parameters import stored_parameters
from qlora.plan.shapes import BaseShapes, read_shapes, shapes_from_config
from qlora.plan.speed import Machine, Work, flop_per_token, passes, step_time, waited_seconds

UNTIED = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MACHINE = Machine(flop_per_second=1e12, inner_bytes_per_second=1e9, outer_bytes_per_second=1e8)
ENDLESS = 1 << 60


def bases() -> dict[str, BaseShapes]:
    return {"tied": read_shapes(Path(tiny_path())), "untied": shapes_from_config(UNTIED)}


def job(**lora: Any) -> JobConfig:
    return JobConfig.model_validate({"lora": {"r": 8, **lora}})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", ["tied", "untied"])
def test_a_micro_step_has_the_arithmetic_and_the_bytes_of_the_plan(which: str, recompute: bool) -> None:
    base = bases()[which]
    work = passes(base, job(), 300, 100, recompute=recompute)
    assert sum(w.flop for w in work) == pytest.approx(300 * flop_per_token(base, job(), 100, recompute=recompute), rel=1e-12)
    stored = stored_parameters(base, job())
    assert sum(w.gathered for w in work) == gathered_bytes(stored, recompute=recompute)


@pytest.mark.parametrize(
    "config", [{"train_embeddings": True, "train_head": True}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_bytes_where_other_things_train(config: dict[str, Any]) -> None:
    base = bases()["untied"]
    work = passes(base, job(**config), 10, 10, recompute=True)
    assert sum(w.gathered for w in work) == gathered_bytes(stored_parameters(base, job(**config)), recompute=True)


def test_the_order_is_forward_then_backward() -> None:
    work = passes(bases()["untied"], job(), 10, 10, recompute=False)
    layers = [w.module.split(".")[2] for w in work if ".layers." in w.module]
    assert layers == sorted(layers[: len(layers) // 2]) + sorted(layers[len(layers) // 2 :], reverse=True)
    assert [w.module for w in work].count("lm_head") == 1  # its gradient is made in forward


def random_work(seed: int) -> list[Work]:
    import random

    draw = random.Random(seed)
    return [
        Work(str(n), draw.randrange(0, 10**10), size := draw.choice([0, draw.randrange(1, 10**7)]), size) for n in range(40)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_with_room_for_all_it_is_a_flow_shop_of_two_machines(seed: int) -> None:
    """Johnson 1954: the last job ends at the longest way that goes along the first machine and then along the second."""
    work = random_work(seed)
    waits = list(waited_seconds(work, MACHINE, 4, ENDLESS))
    compute = [w.flop / MACHINE.flop_per_second for w in work]
    gathers = [seconds for seconds, _ in waits]
    want = max([sum(compute), *(sum(gathers[: n + 1]) + sum(compute[n:]) for n in range(len(work)) if work[n].gathered)])
    assert sum(compute) + sum(waited for _, waited in waits) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_room_or_overlap_everything_adds_up(seed: int) -> None:
    work = random_work(seed)
    gathers = sum(MACHINE.collective_seconds(w.gathered, 4) for w in work if w.gathered)
    one_at_a_time = list(waited_seconds([w for w in work if w.gathered], MACHINE, 4, 1))
    assert sum(waited for _, waited in one_at_a_time) == pytest.approx(gathers, rel=1e-12)
    apart = list(waited_seconds(work, replace(MACHINE, overlap=0.0), 4, ENDLESS))
    assert sum(waited for _, waited in apart) == pytest.approx(gathers, rel=1e-12)


def test_less_room_is_never_faster() -> None:
    work = random_work(7)
    waits = [sum(w for _, w in waited_seconds(work, MACHINE, 4, live)) for live in (1, 10**6, 10**7, 10**8, ENDLESS)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > waits[-1]


def test_a_ring_by_hand() -> None:
    """8 ranks of a node: 7 hops, and 7/8 of the bytes over the inner link; 16 cross nodes."""
    machine = replace(MACHINE, inner_hop_seconds=1e-3, outer_hop_seconds=1e-2)
    assert machine.collective_seconds(1e9, 8) == pytest.approx(7e-3 + 0.875)
    assert machine.collective_seconds(1e9, 16) == pytest.approx(15e-2 + 10 * 0.9375)
    assert machine.collective_seconds(1e9, 1) == 0


def test_one_rank_waits_for_nobody() -> None:
    base = bases()["untied"]
    alone = step_time(base, job(), "zero3", 1, MACHINE, tokens=64, context=64, recompute=False)
    assert (alone.waited, alone.gather, alone.reduce) == (0, 0, 0)
    assert alone.compute == pytest.approx(64 * flop_per_token(base, job(), 64, recompute=False) / 1e12)


@pytest.mark.parametrize(("mode", "times"), [("ddp", 2), ("zero1", 1), ("zero2", 3), ("zero3", 3)])
def test_gradients_travel_once_a_step_or_once_a_micro_step(mode: Any, times: int) -> None:
    base = bases()["untied"]
    elements = sum(p.elements for p in stored_parameters(base, job()) if p.part == "trained")
    found = step_time(base, job(), mode, 4, MACHINE, tokens=64, context=64, micro_steps=3)
    assert found.reduce == pytest.approx(times * MACHINE.collective_seconds(4 * elements, 4))


def test_the_host_is_a_lower_bound() -> None:
    base = bases()["untied"]
    slow = replace(MACHINE, gather_seconds=10.0)
    found = step_time(base, job(), "zero3", 4, slow, tokens=64, context=64, recompute=False)
    gathers = sum(1 for w in passes(base, job(), 64, 64, recompute=False) if w.gathered)
    assert found.host == pytest.approx(10.0 * gathers)
    assert found.total == pytest.approx(found.host + found.reduce + found.update)
