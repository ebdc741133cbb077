"""Under ZeRO-3, should A and B be kept whole on every rank, or gathered with the 4-bit weights beside them?

Trains the same job on two ranks with three values of DeepSpeed's stage3_param_persistence_threshold: 0 (everything is
gathered), 100,000 elements (DeepSpeed's default) and 1,000,000 (this project's), interleaved, and prints the seconds a step
takes and what stays whole. Frozen 4-bit weights and their statistics are never kept, whatever the threshold.

    python benchmarks/resident_lora.py [--runs 5] [--steps 12] [--results benchmarks/results/resident_lora_MACHINE_DATE.md]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from machine import describe, report
from random_base import make_llama, write_job

ROOT = Path(__file__).parents[1]
THRESHOLDS = (0, 100_000, 1_000_000)
WARMUP_STEPS = 3
# Wide enough for A and B to lie on both sides of DeepSpeed's default.
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 16, "tie_word_embeddings": True,
}  # fmt: skip
LORA_RANK = 16


def write_launch(folder: Path, threshold: int) -> Path:
    """The project's launch file with another threshold."""
    launch = yaml.safe_load((ROOT / "launch/accelerate/zero3.yaml").read_text())
    zero = json.loads((ROOT / "launch/deepspeed/zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    (folder / f"{threshold}.json").write_text(json.dumps(zero))
    launch["deepspeed_config"]["deepspeed_config_file"] = str(folder / f"{threshold}.json")
    path = folder / f"{threshold}.yaml"
    path.write_text(yaml.safe_dump(launch))
    return path


def step_seconds(folder: Path, threshold: int, run: int, steps: int) -> list[float]:
    """Seconds of each step after the warm-up, on two ranks with one thread each."""
    out = folder / f"run_{threshold}_{run}"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(write_launch(folder, threshold)),
        "--num_processes", "2", "--main_process_port", "0", "-m", "qlora", "train", str(folder / "job.yaml"),
        f"model.base={folder / 'base'}", f"lora.r={LORA_RANK}", f"data.train=[{folder / 'train.jsonl'}]",
        "data.max_length=128", f"data.cache_dir={folder / 'cache'}", f"train.output_dir={out}", f"train.max_steps={steps}",
        "checkpoint.every_steps=null",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["step_seconds"] for row in rows[WARMUP_STEPS:]]


def resident(threshold: int) -> tuple[int, int]:
    """(parameters of LoRA that stay whole, all of LoRA's), computed from the shape."""
    hidden, ffn = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    sides = [hidden] * 8 + [hidden, ffn] * 3
    sizes = [LORA_RANK * side for side in sides] * SHAPE["num_hidden_layers"]
    return sum(size for size in sizes if size <= threshold), sum(sizes)


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        make_llama(folder / "base", **SHAPE)
        write_job(folder, 64)
        seconds: dict[int, list[float]] = {threshold: [] for threshold in THRESHOLDS}
        for run in range(arguments.runs):
            for threshold in THRESHOLDS if run % 2 == 0 else reversed(THRESHOLDS):
                seconds[threshold].append(statistics.median(step_seconds(folder, threshold, run, arguments.steps)))
    lines = [
        "| threshold, elements | LoRA kept whole | seconds a step, median | quartiles |",
        "|---|---|---|---|",
    ]
    for threshold, found in seconds.items():
        kept, total = resident(threshold)
        low, middle, high = statistics.quantiles(found, n=4)
        lines.append(f"| {threshold:,} | {kept:,} of {total:,} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    lines += ["", f"- {arguments.runs} runs of {arguments.steps} steps, two ranks over gloo; machine: {describe()}"]
    report(arguments.results, "LoRA's parameters under ZeRO-3: kept whole or gathered", __file__, lines)


if __name__ == "__main__":
    main()
