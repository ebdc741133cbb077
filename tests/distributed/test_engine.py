"""The engine of one process. Data parallel is in `tests/e2e`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qlora.distributed.engine import MASTER, PlainEngine


def engine_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> PlainEngine:
    device = torch.device("cpu")
    return PlainEngine(nn.Identity(), {"p": parameter}, optimizer, max_grad_norm, scale_loss=False, device=device)


def test_a_step_clips_to_the_norm_and_returns_it_from_before() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = engine_of(parameter, optimizer, max_grad_norm=1.0)
    engine.backward((parameter * torch.tensor([6.0, 8.0])).sum())
    norm = engine.step(learning_rate=0.5)
    assert (norm.item(), norm.dtype) == (10.0, torch.float32)
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0, 4.0]) - 0.5 * torch.tensor([0.6, 0.8]))
    assert parameter.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], weight_decay=0.1)
    engine = engine_of(parameter, optimizer, max_grad_norm=1.0)
    engine.backward(parameter.square().sum())
    engine.step(0.1)
    before, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    engine.backward((parameter * torch.tensor([1.0, bad, 1.0])).sum())
    assert not engine.step(0.1).isfinite()
    assert torch.equal(parameter, before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[parameter].items())
    assert parameter.grad is None


def test_gradients_of_micro_steps_add_up() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = engine_of(parameter, optimizer, max_grad_norm=100.0)
    for micro_step in range(3):
        with engine.micro_step(last=micro_step == 2):
            engine.backward((parameter * torch.tensor([1.0, 2.0])).sum())
    engine.step(learning_rate=1.0)
    assert parameter.tolist() == [-3.0, -6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_is_there_after_the_first_step_and_can_be_set(dtype: torch.dtype) -> None:
    """In fp32 for parameters in bf16 as well, with the fp32 copy that is updated, as ZeRO has it."""

    def make() -> tuple[nn.Parameter, PlainEngine]:
        parameter = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = torch.optim.AdamW([parameter])
        return parameter, engine_of(parameter, optimizer, max_grad_norm=1.0)

    first, engine = make()
    assert list(engine.optimizer_states(["p"])) == []
    engine.backward(first.square().sum())
    engine.step(0.1)
    ((name, state),) = engine.optimizer_states(["p"])
    assert name == "p"
    assert set(state) == {"exp_avg", "exp_avg_sq"} | ({MASTER} if dtype == torch.bfloat16 else set())
    assert {value.dtype for value in state.values()} == {torch.float32}
    second, other = make()
    second.data.copy_(first.data)
    other.load_optimizer_state({"p": {key: value.clone() for key, value in state.items()}}, step=1)
    for parameter, own in ((first, engine), (second, other)):
        own.backward(parameter.square().sum())
        own.step(0.1)
    assert torch.equal(first, second)
