"""Resuming on the same ranks and stage: to the last bit. On others: test_elastic.py."""

from __future__ import annotations

from typing import Any

import pytest

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
