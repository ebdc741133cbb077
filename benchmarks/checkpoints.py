"""What does a checkpoint cost?

Trains a base of SmolLM2-135M's shape (random weights, NF4, r=16 on all linear layers) with a checkpoint every 40 steps, on
one process and on two ranks under zero3.yaml, and prints how long a save holds a step up (gathering and copying), how long
the writing beside the training takes, what a step takes in the 20 steps after a save and in the 20 before the next one,
which are the steps without, and what all that is of the 500 steps between two checkpoints that a job has by default. A step
is timed from row to row of metrics.jsonl, so that whatever happens between two steps counts. All rows have equally many
tokens.

    python benchmarks/checkpoints.py [--saves 6] [--tokens 128] [--results benchmarks/results/checkpoints_MACHINE_DATE.md]

The fewer tokens a step has, the shorter it is and the larger the share that a save takes. A rank computes with its share of
the cores; where other jobs run beside it, ask for --threads 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import describe, report
from random_base import make_llama, write_job

from qlora.config.schema import CheckpointConfig

ROOT = Path(__file__).parents[1]
PLACES = {"one process": ("single", 1), "two ranks, zero3": ("zero3", 2)}
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "use_cache": False,
}  # fmt: skip
AFTER = 20  # steps after a save that may be slower for it
MOST_LOST, MOST_BYTES, MOST_EXTRA_BYTES = 0.01, 16, 1_000_000


@dataclass(frozen=True)
class Cost:
    """What a run showed. Seconds; of a save the median and the most, of a step medians over the saves."""

    held: list[float]
    written: list[float]
    after: list[float]
    without: list[float]
    lost: list[float]
    num_bytes: int
    num_parameters: int


def train_and_time(arguments: list[str], record: Path) -> int:
    """In a rank: `qlora train`, with the main rank's seconds of each save and each write put into a file."""
    from qlora.checkpoint import saver
    from qlora.cli.main import main as qlora

    seconds: dict[str, list[float]] = {"held": [], "written": []}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name].append(time.perf_counter() - start)

        return call

    saver.Saver.save = timed("held", saver.Saver.save)  # type: ignore[method-assign]
    saver.write_checkpoint = timed("written", saver.write_checkpoint)
    code = qlora(arguments)
    if os.environ.get("RANK", "0") == "0":
        record.write_text(json.dumps(seconds))
    return code


def measure(folder: Path, place: str, saves: int, tokens: int, threads: int | None) -> Cost:
    """One run."""
    config, ranks = PLACES[place]
    out, record = folder / config, folder / f"{config}.json"
    every = 2 * AFTER
    job = [
        "train", str(folder / "job.yaml"), f"model.base={folder / 'base'}", f"data.train=[{folder / 'train.jsonl'}]",
        f"data.max_length={tokens}", "data.packing=false", f"data.cache_dir={folder / 'cache'}", "lora.r=16",
        f"train.output_dir={out}", f"train.max_steps={every * (saves + 1)}", "train.gradient_checkpointing=false",
        f"checkpoint.every_steps={every}", "checkpoint.keep_last=1",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config}.yaml"]
    launch += ["--num_processes", str(ranks), "--main_process_port", "0", __file__, "--record", str(record), "--", *job]
    threads = threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    subprocess.run(launch, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = json.loads(record.read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    took = {b["step"]: b["time"] - a["time"] for a, b in pairwise(rows)}
    after, without, lost = [], [], []
    for save in range(every, every * saves + 1, every):
        behind = [took[save + step] for step in range(1, AFTER + 1)]
        rest = [took[save + step] for step in range(AFTER + 1, every + 1)]
        # The step that is held up is a loss of its own.
        after.append(statistics.median(behind[1:]))
        without.append(statistics.median(rest))
        lost.append(sum(behind) - AFTER * without[-1])
    checkpoint = max((out / "checkpoints").iterdir())
    from safetensors import safe_open

    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        num_parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    # The last save of a run is waited for, with no step behind it.
    return Cost(seconds["held"][:saves], seconds["written"][:saves], after, without, lost, num_bytes, num_parameters)


def tables(costs: dict[str, Cost]) -> list[str]:
    """Tables and verdicts."""
    interval = CheckpointConfig().every_steps
    assert interval is not None
    lines = [
        "| | a save holds a step up, s: median (most) | writing beside the training, s: median (most) "
        f"| a step in the {AFTER - 1} after the held one, s | a step without, s |",
        "|---|---|---|---|---|",
    ]
    for place, cost in costs.items():
        held, written = (f"{statistics.median(v):.3f} ({max(v):.3f})" for v in (cost.held, cost.written))
        after, without = (statistics.median(v) for v in (cost.after, cost.without))
        lines.append(f"| {place} | {held} | {written} | {after:.3f} ({after / without - 1:+.1%}) | {without:.3f} |")
    lines += [
        "",
        f"| | of {interval} steps: held up | held up, and standing still while it is written: the most there can be "
        "| as measured, median and quartiles over saves | bytes of a checkpoint | bytes a trained parameter |",
        "|---|---|---|---|---|---|",
    ]
    verdicts = []
    for place, cost in costs.items():
        whole = interval * statistics.median(cost.without)
        held = statistics.median(cost.held) / whole
        most = held + statistics.median(cost.written) / whole
        low, middle, high = (f"{value / whole:+.2%}" for value in statistics.quantiles(cost.lost, n=4))
        lines.append(
            f"| {place} | {held:.3%} | {most:.3%} | {middle} ({low} to {high}) | {cost.num_bytes:,} "
            f"| {cost.num_bytes / cost.num_parameters:.2f} of {cost.num_parameters:,} |"
        )
        size_kept = cost.num_bytes <= MOST_BYTES * cost.num_parameters + MOST_EXTRA_BYTES
        verdicts.append(
            f"{place}: time {'kept' if most <= MOST_LOST else 'MISSED'}, size {'kept' if size_kept else 'MISSED'}"
        )
    lines += [
        "",
        "- the measured loss is a difference of sums of steps: on a machine with other jobs it is their noise",
        f"- limits, {MOST_LOST:.0%} of the time, and {MOST_BYTES} bytes a trained parameter and 1 MB: {'; '.join(verdicts)}",
    ]
    return lines


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128, help="of a rank's part of a step")
    parser.add_argument("--threads", type=int, help="of each rank")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("job", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        from qlora.distributed.leave import leave

        leave(train_and_time(arguments.job, arguments.record))
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        make_llama(folder / "base", **SHAPE)
        write_job(folder, 64, "A long answer. " * arguments.tokens)  # cut to the same number of tokens
        wanted = arguments.saves, arguments.tokens, arguments.threads
        costs = {place: measure(folder, place, *wanted) for place in PLACES}
    lines = tables(costs)
    cores = f"{arguments.threads} thread(s) a rank" if arguments.threads else "all cores"
    lines += [
        f"- {arguments.saves} saves, {2 * AFTER} steps apart; a step is a row of {arguments.tokens} tokens a rank; {cores}",
        f"- load average before and after: {busy:.1f}, {os.getloadavg()[0]:.1f}; machine: {describe()}",
    ]
    report(arguments.results, "What a checkpoint costs", __file__, lines)


if __name__ == "__main__":
    main()
