"""What does offloading save on a machine without a GPU?

Trains a base of random weights for some steps on two ranks under zero3.yaml, zero3_offload.yaml and zero3_nvme.yaml, and
prints for each rank the peak of its resident memory (VmHWM, mapped pages included) and, sampled during the steps, the least
of its anonymous memory (RssAnon): pages of mapped files, which the system can drop, are not in that.

    python benchmarks/offload.py [--steps 6] [--results benchmarks/results/offload_MACHINE_DATE.md]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from machine import describe, report
from random_base import make_llama, write_job

ROOT = Path(__file__).parents[1]
LAUNCH_FILES = ("zero3", "zero3_offload", "zero3_nvme")
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "tie_word_embeddings": True,
}  # fmt: skip
MIB = 1024 * 1024


def status_bytes(pid: int, key: str) -> int:
    """A line of /proc/PID/status, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def train(folder: Path, launch: str, steps: int) -> dict[int, tuple[int, int]]:
    """Run the job; rank process -> (peak resident bytes, least anonymous bytes after the first step)."""
    out = folder / f"run_{launch}"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{launch}.yaml",
        "--num_processes", "2", "--main_process_port", "0", "-m", "qlora", "train", str(folder / "job.yaml"),
        f"model.base={folder / 'base'}", f"data.train=[{folder / 'train.jsonl'}]", "data.max_length=128",
        f"data.cache_dir={folder / 'cache'}", f"train.output_dir={out}", f"train.max_steps={steps}",
        "checkpoint.every_steps=null",
    ]  # fmt: skip
    job = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    peak: dict[int, int] = {}
    least: dict[int, int] = {}
    metrics = out / "metrics.jsonl"
    while job.poll() is None:
        time.sleep(0.05)
        training = metrics.is_file() and metrics.stat().st_size > 0
        for child in psutil.Process(job.pid).children() if psutil.pid_exists(job.pid) else []:
            try:
                if "qlora" not in child.cmdline():
                    continue
                peak[child.pid] = status_bytes(child.pid, "VmHWM")
                if training:
                    anonymous = status_bytes(child.pid, "RssAnon")
                    least[child.pid] = min(anonymous, least.get(child.pid, anonymous))
            except (psutil.NoSuchProcess, FileNotFoundError, KeyError):
                continue  # it ended between two looks
    if job.returncode:
        raise SystemExit(f"training under {launch} ended with {job.returncode}")
    return {pid: (peak[pid], least[pid]) for pid in sorted(least)}


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        num_weights = make_llama(folder / "base", **SHAPE)
        write_job(folder, 64)
        found = {launch: train(folder, launch, arguments.steps) for launch in LAUNCH_FILES}
    lines = ["| launch file | peak resident, MiB a rank | least anonymous during steps, MiB a rank |", "|---|---|---|"]
    for launch, ranks in found.items():
        peaks, leasts = ([f"{value / MIB:,.0f}" for value in values] for values in zip(*ranks.values(), strict=True))
        lines.append(f"| {launch}.yaml | {', '.join(peaks)} | {', '.join(leasts)} |")
    lines += [
        "",
        f"- base of {num_weights / 1e6:,.0f}M weights, two ranks over gloo, {arguments.steps} steps; machine: {describe()}",
    ]
    report(arguments.results, "What offloading saves without a GPU", __file__, lines)


if __name__ == "__main__":
    main()
