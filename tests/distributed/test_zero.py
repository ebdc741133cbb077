"""What DeepSpeed says of broken gradients. Training under it is in `tests/e2e`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from qlora.distributed import resident, zero


@pytest.mark.parametrize(("said", "wanted"), [(1.5, 1.5), (torch.tensor(0.0), 0.0), (-1.0, math.nan)])
def test_minus_one_is_no_gradient_norm(said: Any, wanted: float) -> None:
    """DeepSpeed gives it for gradients that are infinite or not a number, and clips nothing then."""
    model: Any = SimpleNamespace(
        module=nn.Module(),
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}]),
        step=lambda: None,
        get_global_grad_norm=lambda: said,
    )
    norm = zero.ZeroEngine(model, {}).step(0.25)
    assert norm.item() == pytest.approx(wanted, nan_ok=True)
    assert model.optimizer.param_groups == [{"lr": 0.25}]


def test_what_a_step_has_cut_is_gathered_by_few_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together as many as a bucket holds, in one order on all ranks, and nothing that is whole, as after a skipped step."""
    monkeypatch.setattr(resident, "RESIDENT_BUCKET", 100)
    calls: list[list[int]] = []

    class Parameter:
        ds_status = ZeroParamStatus.NOT_AVAILABLE

        def __init__(self, ds_numel: int) -> None:
            self.ds_numel = ds_numel

        def all_gather_coalesced(self, together: list[Any]) -> Any:
            calls.append([p.ds_numel for p in together])

            def wait() -> None:
                for parameter in together:
                    parameter.ds_status = ZeroParamStatus.AVAILABLE

            return SimpleNamespace(wait=wait)

    parameters = [Parameter(n) for n in (60, 40, 1, 150, 30, 30)]
    parameters[4].ds_status = ZeroParamStatus.AVAILABLE
    resident.gather_resident(parameters)
    assert calls == [[60, 40], [1], [150], [30]]
    resident.gather_resident(parameters)
    assert len(calls) == 4
