"""A base in memory or on a disk instead of on the GPU, with its optimizer's state in memory: the training is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.e2e, pytest.mark.long]
MODES = ["zero3_offload", "zero3_nvme"]


@pytest.mark.parametrize("name", ["zero3_offload.acc1", "zero3_offload.recompute", "zero3_nvme.recompute"])
def test_every_step_is_that_of_zero3_without_offload(project: Any, close_relative: Callable[..., None], name: str) -> None:
    found, wanted = project.result(name), project.result(f"zero3.{name.split('.')[1]}")
    for key in ("loss", "grad_norm"):
        close_relative(found.values(key), wanted.values(key), 1e-4)
    wanted_adapter = wanted.adapter()
    for key, value in found.adapter().items():
        torch.testing.assert_close(value, wanted_adapter[key], atol=2e-4, rtol=1e-4)
    assert "processes 2, zero3, on" in found.logs[0]


@pytest.mark.parametrize(
    ("name", "same"), [("zero3_offload.acc1", "zero3.acc1"), ("zero3_nvme.recompute", "zero3_offload.recompute")]
)
def test_so_is_evaluation_in_the_middle(project: Any, close_relative: Callable[..., None], name: str, same: str) -> None:
    found, wanted = project.result(name).evaluations, project.result(same).evaluations
    assert [row["step"] for row in found] == [2, 4, 6, 7]
    close_relative([row["eval_loss"] for row in found], [row["eval_loss"] for row in wanted], 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(project: Any, mode: str) -> None:
    resumed, whole = project.result(f"{mode}.resumed"), project.result(f"{mode}.recompute")
    assert "after step 3" in resumed.logs[0]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert resumed.values(key) == whole.values(key)
    names = ["adapter/adapter_model.safetensors"]
    names += [f"checkpoints/step-0000000{step}/optimizer.safetensors" for step in (3, 6, 7)]
    for name in names:
        assert (resumed.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes(), name


def test_a_base_on_a_disk_is_the_base(project: Any) -> None:
    found, wanted = project.result("zero3_nvme.tiny"), project.result("zero3_offload.tiny")
    for key in ("loss", "grad_norm"):
        assert found.values(key) == wanted.values(key)


def test_a_base_on_a_disk_leaves_nothing_there_when_its_ranks_are_killed(
    project: Any, tmp_path: Path, patiently: Callable[..., Any], descendants: Callable[[int], list[int]]
) -> None:
    """The launch file names `runs`, in the folder that the command is started in."""
    shares = Path(__file__).parents[2] / "runs"
    before = {path for path in shares.glob("*") if path.is_file()}
    job = ["train", str(project.job), f"train.output_dir={tmp_path}/run", "model.base=builtin:tiny", "train.max_steps=500"]
    process = project.launch("zero3_nvme", 2, *job, log=tmp_path / "log")

    def in_files() -> list[int]:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        counts = [maps_of(pid).count(f" {shares}/") for pid in descendants(process.pid)]
        return [count for count in counts if count]

    # Seven packed weights of each of six blocks, and the embedding; both ranks.
    patiently(lambda: [count for count in in_files() if count >= 6 * 7 + 1][1:])
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert {path for path in shares.glob("*") if path.is_file()} == before


def maps_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""
