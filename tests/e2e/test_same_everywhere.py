"""Ranks of different nodes may see different files under one name: that is refused on all of them, and nobody waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys
os.chdir(sys.argv[1] + os.environ["RANK"])
from qlora.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.e2e
def test_ranks_with_other_data_are_refused(random_base: Path, tmp_path: Path) -> None:
    for rank in range(2):
        node = tmp_path / f"node{rank}"
        node.mkdir()
        row = {"prompt": "what is this", "completion": "an answer " * (rank + 1)}
        (node / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    job = tmp_path / "job.yaml"
    job.write_text("{}\n")
    overrides = [
        f"model.base={random_base}", "data.train=[rows.jsonl]", "data.max_length=64", f"data.cache_dir={tmp_path / 'cache'}",
        f"train.output_dir={tmp_path / 'run'}", "train.max_steps=2", "model.dtype=float32", "lora.r=2",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/ddp.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0", str(script), str(tmp_path / "node")]
    done = subprocess.run(
        [*launch, "train", str(job), *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode != 0
    assert "the ranks do not hold the same data" in done.stderr
    assert not (tmp_path / "run").exists()
