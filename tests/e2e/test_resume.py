"""Resuming: to the last bit where ranks stay as they were, and within rounding on other ranks and other stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.e2e
MODES = ["single", "ddp", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(project: Any, mode: str) -> None:
    """With weight decay and dropout on, so that moments, masters, seeds and the data's position all matter."""
    is_the_same_run(project.result(f"{mode}.resumed"), project.result(f"{mode}.dropout"))


@pytest.mark.parametrize("mode", ["single", "ddp", "zero3"])
def test_so_is_one_that_trains_modules_as_wholes(project: Any, mode: str) -> None:
    is_the_same_run(project.result(f"{mode}.wholly_resumed"), project.result(f"{mode}.wholly"))


def is_the_same_run(resumed: Any, whole: Any) -> None:
    assert "after step 3" in resumed.logs[0]
    assert [row["step"] for row in resumed.training] == list(range(1, 8))
    for key in ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "num_target_tokens"):
        assert resumed.values(key) == whole.values(key)
    names = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    names += [f"checkpoints/step-0000000{step}/optimizer.safetensors" for step in (3, 6, 7)]
    for name in names:
        assert (resumed.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes(), name


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [
        ("again.from_zero3", "single.acc2"),
        ("zero3.from_single", "single.acc2"),
        ("ddp.from_zero2", "single.acc2"),
        ("sharded.six_from_two", "zero3.six"),
    ],
)
def test_other_ranks_stages_and_splits_go_on_within_rounding(
    project: Any, close_relative: Callable[..., None], resumed: str, whole: str
) -> None:
    found, wanted = project.result(resumed), project.result(whole)
    assert "after step 3" in found.logs[0]
    for key in ("loss", "grad_norm"):
        close_relative(found.values(key)[3:], wanted.values(key)[3:], 1e-4)
    for key in ("epoch", "num_tokens", "num_target_tokens"):
        assert found.values(key) == wanted.values(key)
    wanted_adapter = wanted.adapter()
    for key, value in found.adapter().items():
        torch.testing.assert_close(value, wanted_adapter[key], atol=2e-4, rtol=1e-4)
