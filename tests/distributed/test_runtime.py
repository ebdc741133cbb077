"""One process's part of what `tests/e2e` does with several."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from qlora.distributed import runtime as module
from qlora.distributed.collectives import GATHER_BYTES, whole_parameters, whole_shape
from qlora.distributed.runtime import PlainEngine, Runtime
from qlora.errors import CheckpointError, LaunchError, QloraError


def runtime(rank: int = 0, world_size: int = 1, mode: str = "single") -> Runtime:
    accelerator: Any = None
    return Runtime(accelerator, rank, world_size, rank, torch.device("cpu"), mode)


class TwoRanks(Runtime):
    """Both ranks of `from_main` in one process: rank 1 gets what rank 0 has sent, pickled."""

    sent: list[bytes]

    def broadcast_object(self, value: Any) -> Any:
        if self.is_main:
            self.sent = [pickle.dumps(value)]
        return pickle.loads(self.sent[0])


def two_ranks() -> tuple[TwoRanks, TwoRanks]:
    accelerator: Any = None
    pair = [TwoRanks(accelerator, rank, 2, rank, torch.device("cpu"), "ddp") for rank in (0, 1)]
    pair[0].sent = pair[1].sent = []
    return pair[0], pair[1]


def test_work_of_the_main_rank_reaches_all() -> None:
    main, other = two_ranks()
    assert main.from_main(lambda: {"a": 1}) == {"a": 1}
    other.sent = main.sent
    assert other.from_main(lambda: pytest.fail("the main rank's work alone")) == {"a": 1}


def test_an_error_of_the_main_rank_is_everybodys() -> None:
    error = CheckpointError("it is gone", place="here", found=1, wanted=2, next_step="look")

    def fail() -> None:
        raise error

    main, other = two_ranks()
    with pytest.raises(CheckpointError) as raised:
        main.from_main(fail)
    other.sent = main.sent
    with pytest.raises(CheckpointError) as raised_there:
        other.from_main(fail)
    assert str(raised.value) == str(raised_there.value) == str(error)


def test_a_bug_on_the_main_rank_ends_the_others_too() -> None:
    class CannotTravelError(Exception):
        def __init__(self) -> None:
            super().__init__("x")
            self.lock = open("/dev/null")  # noqa: SIM115

    def fail() -> None:
        raise CannotTravelError

    main, other = two_ranks()
    with pytest.raises(CannotTravelError):
        main.from_main(fail)
    other.sent = main.sent
    with pytest.raises(RuntimeError, match=r"the main rank failed: CannotTravelError: x"):
        other.from_main(fail)


@pytest.mark.parametrize("error", [QloraError, CheckpointError])
def test_errors_survive_the_way(error: type[QloraError]) -> None:
    again = pickle.loads(pickle.dumps(error("m", place="p", found=[1], wanted="w", next_step="n")))
    assert type(again) is error
    assert str(again) == "p: m\n  found: [1]\n  wanted: w\n  next: n"


def test_ranks_that_do_not_see_one_another_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module._check_world(runtime())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="each would train alone"):
        module._check_world(runtime())


def test_a_step_clips_to_the_norm_and_returns_it_from_before() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = PlainEngine(runtime(), nn.Identity(), {"p": parameter}, optimizer, max_grad_norm=1.0, scale_loss=False)
    engine.backward((parameter * torch.tensor([6.0, 8.0])).sum())
    norm = engine.step(learning_rate=0.5)
    assert (norm.item(), norm.dtype) == (10.0, torch.float32)
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0, 4.0]) - 0.5 * torch.tensor([0.6, 0.8]))
    assert parameter.grad is None


def test_gradients_of_micro_steps_add_up() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = PlainEngine(runtime(), nn.Identity(), {"p": parameter}, optimizer, max_grad_norm=100.0, scale_loss=False)
    for micro_step in range(3):
        with engine.micro_step(last=micro_step == 2):
            engine.backward((parameter * torch.tensor([1.0, 2.0])).sum())
    engine.step(learning_rate=1.0)
    assert parameter.tolist() == [-3.0, -6.0]


def test_optimizer_state_is_there_after_the_first_step_and_can_be_set() -> None:
    def make() -> tuple[nn.Parameter, PlainEngine]:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter])
        return parameter, PlainEngine(runtime(), nn.Identity(), {"p": parameter}, optimizer, 1.0, scale_loss=False)

    first, engine = make()
    assert engine.optimizer_state("p") == {}
    engine.backward(first.square().sum())
    engine.step(0.1)
    state = engine.optimizer_state("p")
    assert set(state) == {"exp_avg", "exp_avg_sq"}
    second, other = make()
    second.data.copy_(first.data)
    other.load_optimizer_state({"p": {key: value.clone() for key, value in state.items()}}, step=1)
    for parameter, own in ((first, engine), (second, other)):
        own.backward(parameter.square().sum())
        own.step(0.1)
    assert torch.equal(first, second)


def test_whole_parameters_are_copies_in_any_number_of_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.distributed.collectives.GATHER_BYTES", 16)
    assert GATHER_BYTES > 16
    parameters = {str(n): nn.Parameter(torch.full((n, 2), float(n), dtype=torch.bfloat16).t()) for n in range(1, 6)}
    found = whole_parameters(parameters)
    assert list(found) == list(parameters)
    for key, value in found.items():
        assert torch.equal(value, parameters[key])
        assert value.is_contiguous()
        assert value.data_ptr() != parameters[key].data_ptr()
        assert whole_shape(parameters[key]) == tuple(value.shape)
    assert whole_parameters(parameters, keep=False) == {}
