"""One process's part of what `tests/e2e` does with several."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from qlora.distributed import runtime as module
from qlora.distributed.collectives import GATHER_BYTES, whole_parameters, whole_shape
from qlora.distributed.runtime import Runtime
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
