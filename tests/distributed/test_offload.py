"""Offload settings: what works is taken, and what DeepSpeed would ignore, could not do, or do for nothing is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.distributed.offload import refuse_bad_offload, take_share_folder
from qlora.errors import LaunchError

LAUNCH = Path(__file__).parents[2] / "launch/deepspeed"
CPU = {"device": "cpu"}


def config(stage: int = 3, *, force: bool | None = False, **zero: Any) -> dict[str, Any]:
    top = {} if force is None else {"zero_force_ds_cpu_optimizer": force}
    return {**top, "zero_optimization": {"stage": stage, **zero}}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.json")), ids=lambda p: p.name)
def test_shipped_files_are_taken(path: Path) -> None:
    refuse_bad_offload(json.loads(path.read_text()), "adamw")


@pytest.mark.parametrize(
    "stated",
    [
        config(offload_param=CPU),
        config(offload_optimizer=CPU | {"pin_memory": True}),
        config(1, offload_optimizer=CPU),
        config(2, offload_optimizer=CPU | {"ratio": 1.0}),
        config(2, force=None, offload_param={"device": "none"}, offload_optimizer={"device": "none"}),
        config(1, force=None, offload_param=None, offload_optimizer=None),
        config(force=None, offload_param={"device": "nvme", "nvme_path": "runs"}),
    ],
)
def test_what_works_is_taken(stated: dict[str, Any]) -> None:
    refuse_bad_offload(stated, "adamw")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (config(2, offload_param=CPU), "at stage 3 alone"),
        (config(1, offload_param={"device": "nvme", "nvme_path": "x"}), "at stage 3 alone"),
        (config(2, cpu_offload=True), "former name"),
        (config(3, cpu_offload_param=True), "former name"),
        (config(offload_param={"device": "nvme"}), "needs a folder"),
        (
            config(offload_param={"device": "nvme", "nvme_path": "x", "buffer_count": 5, "buffer_size": 1}),
            "buffer_count, buffer",
        ),
        (config(offload_optimizer={"device": "nvme", "nvme_path": "x"}), "could not be resumed"),
        (config(offload_optimizer=CPU, zenflow={"topk_ratio": 0.1}), "zenflow"),
        (config(offload_optimizer=CPU | {"ratio": 0.5}), "ratio and super_offload"),
        (config(offload_optimizer=CPU | {"super_offload": True}), "ratio and super_offload"),
        (config(offload_optimizer=CPU, force=None), "compile an AdamW"),
        (config(offload_optimizer=CPU, force=True), "compile an AdamW"),
    ],
)
def test_what_does_not_is_refused(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message) as raised:
        refuse_bad_offload(stated, "adamw")
    assert str(raised.value.place).startswith("DeepSpeed JSON: ")
    assert raised.value.next_step


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw"])
def test_optimizers_of_a_gpu_are_refused_where_the_state_is_not(optimizer: str) -> None:
    refuse_bad_offload(config(offload_param=CPU), optimizer)
    with pytest.raises(LaunchError, match=f"{optimizer} computes on a GPU"):
        refuse_bad_offload(config(offload_optimizer=CPU), optimizer)


def test_deepspeed_is_not_told_of_the_disk() -> None:
    zero = config(offload_param={"device": "nvme", "nvme_path": "some/where"})["zero_optimization"]
    assert take_share_folder(zero) == Path("some/where")
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert take_share_folder(zero) is None
    assert take_share_folder({"stage": 2}) is None
