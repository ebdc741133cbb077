"""The learning rate by step, against transformers' schedules where they agree by design, and the optimizers on offer."""

from __future__ import annotations

import pytest
import torch
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from qlora.config.schema import TrainConfig
from qlora.errors import ConfigError
from qlora.train.optim import build_optimizer, learning_rate_at, num_warmup_steps

CPU = torch.device("cpu")


def rates(num_steps: int, **changes: object) -> list[float]:
    config = TrainConfig(learning_rate=0.5, **changes)
    return [learning_rate_at(step, config, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_after_warmup_it_is_transformers_schedule(kind: str, warmup: int) -> None:
    num_steps = 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = {
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, num_steps),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, num_steps),
        "constant": lambda: get_constant_schedule(optimizer),
    }[kind]()
    wanted = []
    for _ in range(num_steps):
        wanted.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = rates(num_steps, lr_scheduler_type=kind, warmup_steps=warmup)
    assert found[warmup:] == pytest.approx(wanted[warmup:], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_warmup_rises_in_equal_steps_and_never_wastes_one(kind: str) -> None:
    """transformers' first step has a learning rate of zero; ours has not."""
    found = rates(20, lr_scheduler_type=kind, warmup_steps=4)
    differences = [b - a for a, b in zip([0.0, *found[:4]], found[:5], strict=True)]
    assert differences == pytest.approx([0.1] * 5)
    assert found[4] == 0.5
    assert min(found) > 0


def test_warmup_ratio_counts_whole_steps_and_warmup_steps_win() -> None:
    assert num_warmup_steps(TrainConfig(warmup_ratio=0.03), 100) == 3
    assert num_warmup_steps(TrainConfig(warmup_ratio=0.03), 10) == 1
    assert num_warmup_steps(TrainConfig(warmup_ratio=0.0), 10) == 0
    assert num_warmup_steps(TrainConfig(warmup_ratio=0.5, warmup_steps=2), 10) == 2
    assert rates(3, warmup_ratio=1.0) == pytest.approx([0.125, 0.25, 0.375])


def test_optimizers_for_a_gpu_are_refused_without_one_and_under_sharding() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    for device, sharded in ((CPU, False), (torch.device("cuda"), True)):
        with pytest.raises(ConfigError, match=r"train\.optimizer"):
            build_optimizer([parameter], TrainConfig(optimizer="adamw_8bit"), device, sharded=sharded)


def test_adamw_takes_the_jobs_numbers() -> None:
    config = TrainConfig(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.3)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], config, CPU, sharded=False)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.3)


def test_what_is_updated_on_the_cpu_is_updated_by_the_fused_kernel() -> None:
    for on_cpu in (True, False):
        parameter = torch.nn.Parameter(torch.zeros(2))
        optimizer = build_optimizer([parameter], TrainConfig(), CPU, sharded=True, on_cpu=on_cpu)
        assert bool(optimizer.param_groups[0]["fused"]) == on_cpu
