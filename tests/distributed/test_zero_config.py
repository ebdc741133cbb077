"""DeepSpeed's configuration as we fill it. Training under it is in `tests/e2e`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora.distributed.zero_config import fill_config
from qlora.errors import LaunchError

LAUNCH = Path(__file__).parents[2] / "launch/deepspeed"
NUMBERS: dict[str, Any] = {
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5,
    "world_size": 4,
}


def fill(config: dict[str, Any], **options: Any) -> int:
    plugin = SimpleNamespace(deepspeed_config=config, dschf=object())
    stage = fill_config(plugin, **NUMBERS, **options)
    assert plugin.dschf is None  # or transformers would build every model by its own zero.Init
    return stage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_becomes_the_jobs_numbers(stage: int) -> None:
    config = json.loads((LAUNCH / f"zero{stage}.json").read_text())
    assert fill(config) == stage
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("key", "stated"), [("gradient_accumulation_steps", 1), ("gradient_clipping", 1.0), ("train_batch_size", 32)]
)
def test_a_number_that_contradicts_the_job_is_refused(key: str, stated: float) -> None:
    with pytest.raises(LaunchError, match=f"{key} contradicts the job file"):
        fill({"zero_optimization": {"stage": 2}, key: stated})


def test_the_same_number_is_taken() -> None:
    assert fill({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 3, "gradient_clipping": 0.5}) == 2


def test_where_nothing_is_trained_no_number_contradicts() -> None:
    config = {"zero_optimization": {"stage": 3}, "gradient_clipping": 7.0, "train_batch_size": 99}
    assert fill(config, trains=False) == 3
    assert (config["gradient_clipping"], config["train_batch_size"]) == (0.5, 24)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_modes_that_cast_adapters_are_refused(mode: str) -> None:
    with pytest.raises(LaunchError, match=f"{mode}.enabled would cast the adapters"):
        fill({"zero_optimization": {"stage": 2}, mode: {"enabled": True}})
    assert fill({"zero_optimization": {"stage": 2}, mode: {"enabled": False}}) == 2


@pytest.mark.parametrize(
    ("key", "stated"),
    [("zero_hpz_partition_size", 8), ("zero_quantized_weights", True), ("zero_quantized_nontrainable_weights", True)],
)
def test_copies_of_a_shared_base_that_would_be_wrong_are_refused(key: str, stated: int) -> None:
    with pytest.raises(LaunchError, match=r"4-bit weights once more|reads its share alone"):
        fill({"zero_optimization": {"stage": 3, key: stated}})
    assert fill({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}}) == 3
