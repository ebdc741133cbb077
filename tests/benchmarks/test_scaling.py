"""benchmarks/scaling.py says what its figures rest on, and finds the link that made the times it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scaling
from scaling_tables import BASES, shapes

from qlora.config.schema import JobConfig
from qlora.plan.gathers import gathered_bytes
from qlora.plan.parameters import stored_parameters
from qlora.plan.speed import Machine, passes

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/scaling.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.long
def test_it_says_that_it_is_a_model_and_what_is_assumed() -> None:
    said = run("--tflops", "500", "--inner", "300").stdout
    assert "a model, never a measurement" in said
    assert "500 TFLOP/s in a step, assumed" in said
    assert "links, assumed: 300 GB/s in a node of 8" in said
    for name in BASES:
        assert f"## {name}" in said


RESULTS: dict[str, Any] = {
    "device": "NVIDIA H100",
    "date": "2026-01-02",
    "tiny": False,
    "ours": [
        {"rows": 2, "length": 2048, "recompute": False, "model_flop_per_second": 5e14},
        {"rows": 1, "length": 4096, "recompute": True, "model_flop_per_second": 3e14},
        {"rows": 1, "length": 4096, "recompute": False, "model_flop_per_second": 4e14},
        {"rows": 1, "length": 8192, "out_of_memory": True},
        {"kernels": {}},
    ],
}


@pytest.mark.long
def test_what_a_gpu_does_comes_from_its_results(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(RESULTS))
    said = run("--gpu-results", str(file)).stdout
    assert "400 TFLOP/s in a step, measured on NVIDIA H100, 2026-01-02, 1 x 4096 tokens" in said


@pytest.mark.parametrize("changes", [{"tiny": True}, {"ours": []}])
def test_results_of_a_smoke_run_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="holds no step of a GPU"):
        scaling.measured_flop(RESULTS | changes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_fit_finds_the_link_that_made_the_times(ranks: int) -> None:
    link = Machine(1e12, gpus_per_node=8, inner_bytes_per_second=7e8, inner_hop_seconds=3e-4)
    times = {size: link.collective_seconds(size, ranks) for size in (1, 1 << 16, 1 << 26)}
    hop, rate = scaling.fit_link(times, ranks)
    assert hop == pytest.approx(3e-4, rel=1e-4)
    assert rate == pytest.approx(7e8, rel=1e-6)


def test_a_prediction_by_hand() -> None:
    """Nothing overlaps: a process' own step, every gather with its hop, its bytes, its copy and its hook, then the rest."""
    base, job = shapes("Llama-3.1-8B"), JobConfig.model_validate({"data": {"max_length": 256}})
    link = Machine(1e12, inner_bytes_per_second=1e9, inner_hop_seconds=1e-3)
    links = {
        "gather_seconds": {str(size): link.collective_seconds(size, 2) for size in (1, 1 << 26)},
        "copy_bytes_per_second": 4e9,
    }
    _, found = scaling.predict(base, job, 2, 5.0, 2e-3, links)
    gathers = sum(1 for work in passes(base, job, 256, 256, recompute=False) if work.gathered)
    num_bytes = gathered_bytes(stored_parameters(base, job), recompute=False)
    assert found.compute == pytest.approx(5.0)
    assert found.waited == pytest.approx(gathers * (1e-3 + 2e-3) + num_bytes * (0.5 / 1e9 + 1 / 4e9), rel=1e-4)
