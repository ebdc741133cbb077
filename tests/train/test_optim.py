"""The learning rate by step, against transformers' schedules where they agree by design, the optimizers on offer, LoRA+."""

from __future__ import annotations

import pytest
import torch
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from qlora.config.schema import LoraConfig, TrainConfig
from qlora.distributed.engine import PlainEngine
from qlora.errors import ConfigError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import trained_B
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


# LoRA+ (Hayou et al. 2024).


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, for one parameter in float64."""

    def __init__(self, value: torch.Tensor, config: TrainConfig) -> None:
        self.value, self.config, self.step = value.detach().double(), config, 0
        self.m = self.v = torch.zeros_like(self.value)

    def update(self, gradient: torch.Tensor, learning_rate: float) -> torch.Tensor:
        c, g = self.config, gradient.double()
        self.step += 1
        self.m = c.adam_beta1 * self.m + (1 - c.adam_beta1) * g
        self.v = c.adam_beta2 * self.v + (1 - c.adam_beta2) * g * g
        m, v = self.m / (1 - c.adam_beta1**self.step), self.v / (1 - c.adam_beta2**self.step)
        decayed = self.value * (1 - learning_rate * c.weight_decay)
        self.value = decayed - learning_rate * m / (v.sqrt() + c.adam_epsilon)
        return self.value


@pytest.mark.parametrize("ratio", [None, 1.0, 16.0])
def test_B_learns_at_its_own_rate(ratio: float | None) -> None:
    """Every parameter after each of three steps, whose rates differ, against AdamW by hand."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 4))
    inject_lora(model, LoraConfig(r=2, lora_bias=True, train_norms=True))
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, loraplus_lr_ratio=ratio)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lora_B = trained_B(model)
    of_B = {name for name in parameters if "lora_B" in name or "lora_bias" in name}
    assert {id(p) for p in lora_B} == {id(parameters[name]) for name in of_B}
    assert len(of_B) == 4
    optimizer = build_optimizer(parameters.values(), config, CPU, sharded=False, lora_B=lora_B)
    engine = PlainEngine(model, parameters, optimizer, 1e9, False, CPU)
    by_hand = {name: AdamW(p, config) for name, p in parameters.items()}
    for learning_rate in (0.01, 0.02, 0.005):
        engine.backward(model(torch.randn(7, 6)).square().sum())
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        engine.step(learning_rate)
        for name, parameter in parameters.items():
            want = by_hand[name].update(gradients[name], learning_rate * ((ratio or 1.0) if name in of_B else 1.0))
            torch.testing.assert_close(parameter.detach().double(), want, rtol=1e-5, atol=1e-6)


def test_the_magnitude_of_dora_is_no_B() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    inject_lora(model, LoraConfig(r=2, use_dora=True))
    assert [id(p) for p in trained_B(model)] == [id(model[0].lora_B["default"])]


def test_of_several_adapters_the_active_ones_B_counts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    inject_lora(model, LoraConfig(r=2), "a")
    inject_lora(model, LoraConfig(r=2), "b")
    assert [id(p) for p in trained_B(model)] == [id(model[0].lora_B["b"])]


def test_a_ratio_without_a_B_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.loraplus_lr_ratio: nothing that trains is the B"):
        build_optimizer([torch.nn.Parameter(torch.zeros(2))], TrainConfig(loraplus_lr_ratio=4), CPU, sharded=False)


def test_everything_is_updated_by_one_kernel() -> None:
    for sharded in (True, False):
        optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], TrainConfig(), CPU, sharded=sharded)
        assert all(group["fused"] for group in optimizer.param_groups)
