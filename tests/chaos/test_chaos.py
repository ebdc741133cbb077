"""A run that is killed again and again, at random, is in the end the run that nobody killed.

A few kills here; a hundred and more in `make chaos`. A failure prints the seed and the lap that repeat it:

    QLORA_CHAOS_SEED=0 QLORA_CHAOS_LAP=3 .venv/bin/python -m pytest -s tests/chaos
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
KILLS = int(os.environ.get("QLORA_CHAOS_KILLS", "12"))
CONTROL = int(os.environ.get("QLORA_CHAOS_CONTROL", "1"))
SEED = os.environ.get("QLORA_CHAOS_SEED", "0")
LAP = os.environ.get("QLORA_CHAOS_LAP", "0")


@pytest.fixture(scope="module")
def report(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The campaign, in a process of its own that forks all ranks; what it found, or its failure."""
    folder = tmp_path_factory.mktemp("chaos")
    options = {"base": random_base, "folder": folder / "laps", "kills": KILLS, "control": CONTROL, "seed": SEED, "lap": LAP}
    command = [sys.executable, str(Path(__file__).with_name("campaign.py"))]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE"))}
    # One thread a process, or there would be no forking; nothing is compiled, and DeepSpeed says nothing of GPUs.
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    log = folder / "campaign.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=environment, text=True)
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            code = process.wait(timeout=60)
        finally:
            process.terminate()  # it takes its ranks along
            process.wait()
    if code:
        pytest.fail("".join(lines)[-12000:] + log.read_text(errors="replace")[-3000:], pytrace=False)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_every_run_that_is_killed_ends_as_the_one_that_is_not(report: dict[str, Any]) -> None:
    """Losses at every step, the documents of every step, the adapter, what lies on the disk: `checks.py` has looked."""
    assert report["kills"] == KILLS
    stops = [number for how, number in report["ended before it was killed"].items() if how.startswith("stopped")]
    assert report["starts"] == KILLS + report["laps"] + sum(stops)
    assert sum(report["kinds"].values()) == KILLS
    if KILLS >= 12:
        assert len(report["kinds"]) >= 4
        assert len(report["worlds"]) >= 4


def test_without_the_commit_protocol_it_does_not(report: dict[str, Any]) -> None:
    """The same kills, and files that are written in place: else nothing above would prove anything."""
    assert len(report["control"]["found"]) > 0, report["control"]
