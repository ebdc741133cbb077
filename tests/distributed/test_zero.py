"""What DeepSpeed says of broken gradients. Training under it is in `tests/e2e`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qlora.distributed import zero


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
