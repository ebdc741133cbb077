"""benchmarks/gpu.py: every part runs, on a tiny shape. Without a GPU nothing is measured. What does not count says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_report
import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ["--tiny", "--device", "cpu"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["benchmarks/gpu.py needs a CUDA GPU, and torch sees none here: nothing was measured"]
    assert not list(tmp_path.iterdir())


def check(results: dict[str, Any], text: str) -> None:
    """What every part has to have found."""
    assert "no figure here means anything" in text
    steps = [row for row in results["ours"] if "kernels" not in row]
    assert {(row["quantized"], row["r"]) for row in steps} == {(True, 16), (True, 32), (False, 16)}
    assert {row["recomputed_layers"] for row in steps} == {0, 3}
    assert min(row["smallest_norm"] for row in steps) > 0
    (kernels,) = (row["kernels"] for row in results["ours"] if "kernels" in row)
    assert len(kernels["top"]) == 20
    assert sum(row["share"] for row in kernels["top"]) <= 1
    assert results["ceilings"][0]["product_flop_per_second"] > 0
    assert results["longest"][0]["fits"]
    assert {(row["layers"], row["quantized"]) for row in results["bases"]} == {(3, True), (2, True), (3, False)}


@pytest.mark.long
def test_every_part_runs(tmp_path: Path) -> None:
    done = run(*TINY, "--one-process", "--parts", "ceilings,steps,longest,sixteen,wider", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    check(results, file.with_suffix(".md").read_text())
    assert results["notes"] == []


@pytest.mark.long
def test_parts_and_peers_in_processes_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the bench extra installs it")
    done = run(*TINY, "--pairs", "1", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    check(results, file.with_suffix(".md").read_text())
    assert {"ours", "trl_defaults", "trl_best"} <= {row["arm"] for row in results["peers"]}
    assert all("not installed" in note for note in results["notes"])


def test_a_part_without_time_is_named(tmp_path: Path) -> None:
    done = run(*TINY, "--minutes", "0", "--parts", "ceilings", "--results", str(tmp_path))
    assert done.returncode == 0
    assert "ceilings: no time was left" in next(tmp_path.glob("*.md")).read_text()


def arm(name: str, speed: float, loss: float = 8.0, norm: float = 1.0) -> dict[str, Any]:
    return {
        "arm": name, "tokens_per_second": speed, "losses": [loss, loss], "smallest_norm": norm, "recomputed_layers": 0,
        "max_allocated_bytes": 1 << 30, "first_step_seconds": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ([arm("trl_best", 50.0), arm("trl_best", 100.0)], "**1.50** (2 pairs, 1.00 to 2.00)"),
        ([arm("trl_best", 50.0, loss=8.1)], "does not count: losses differ by 1.2%"),
        ([arm("trl_best", 50.0, norm=0.0)], "does not count: a gradient norm is zero"),
    ],
)
def test_what_counts_beside_others(theirs: list[dict[str, Any]], verdict: str) -> None:
    results = {"device": "x", "date": "y", "tiny": False, "set": {}, "notes": []}
    text = gpu_report.lines(results | {"peers": [arm("ours", 100.0), arm("ours", 100.0), *theirs]})
    assert next(line for line in text if line.startswith("| trl_best")).endswith(f"| {verdict} |")
