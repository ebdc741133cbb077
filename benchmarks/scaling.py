"""How fast are 8 to 512 GPUs? A model, never a measurement, and how far it is off over gloo on this machine.

Without `--check` it prints tokens a second of one GPU and its efficiency for 8B, 70B and 405B under DDP, ZeRO-1 and ZeRO-3,
by `qlora.plan.speed`. What one GPU does comes from a results file of `benchmarks/gpu.py` or is assumed, and the output says
which; link speeds are assumed.

`--check` asks of the model what can be measured here. It measures a process' step by itself, gloo's gathers, copying, and
what hooks cost under ZeRO-3 on one rank; predicts a step of ZeRO-3 on 2 and 4 ranks from these alone; and runs it, through
accelerate launch. All of it is measured in turn, in one launch for each number of ranks. Every rank has one thread. Links
and computation share the cores here, so nothing overlaps, and a process' own step is measured while the other ranks do
theirs: with more ranks than cores they take turns, which on GPUs they do not.

    python benchmarks/scaling.py [--gpu-results benchmarks/results/gpu_DEVICE_DATE.json] [--tflops 450] [--tokens 4096] ...
    python benchmarks/scaling.py --check [--results benchmarks/results/scaling_check_MACHINE_DATE.md]
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
from typing import Any

from machine import describe, report
from scaling_tables import BASES, CONTEXT, MACHINE, shapes, speed_table
from scaling_worker import SIZES, make_base

from qlora.config.schema import JobConfig
from qlora.plan.shapes import BaseShapes, read_shapes
from qlora.plan.speed import Machine, StepTime, passes, step_time

ROOT = Path(__file__).resolve().parents[1]
RANKS = (2, 4)


def predicted_lines(arguments: argparse.Namespace) -> list[str]:
    """The tables of the model, with what they rest on."""
    flop, source = arguments.tflops * 1e12, "assumed"
    if arguments.gpu_results is not None:
        flop, source = measured_flop(json.loads(arguments.gpu_results.read_text()))
    machine = Machine(
        flop_per_second=flop,
        gpus_per_node=arguments.gpus_per_node,
        inner_bytes_per_second=arguments.inner * 1e9,
        outer_bytes_per_second=arguments.outer * 1e9,
        inner_hop_seconds=arguments.inner_hop * 1e-6,
        outer_hop_seconds=arguments.outer_hop * 1e-6,
        gather_seconds=arguments.gather_overhead * 1e-6,
        overlap=arguments.overlap,
    )
    lines = [
        "**This is a model, never a measurement.** Tokens a second of one GPU, and in brackets its efficiency against a GPU",
        "that waits for nobody and computes the same.",
        "",
        f"- one GPU: {flop / 1e12:,.0f} TFLOP/s in a step, {source}",
        f"- links, assumed: {arguments.inner:g} GB/s in a node of {arguments.gpus_per_node}, {arguments.outer:g} GB/s "
        f"across nodes; {arguments.inner_hop:g} and {arguments.outer_hop:g} µs a hop of a ring",
        f"- {arguments.overlap:.0%} of a gather can overlap; {arguments.gather_overhead:g} µs of the host for each",
        f"- {arguments.tokens:,} tokens a GPU, one document, one micro-step, r = 16, NF4",
    ]
    for name in BASES:
        lines += ["", f"## {name}", "", speed_table(shapes(name), machine, arguments.tokens)]
    return lines


def measured_flop(results: dict[str, Any]) -> tuple[float, str]:
    """FLOP a second of a step, and where it was measured: the row of 4,096 tokens without recomputation, or the fastest.

    Raises SystemExit where a file has no row, or rows of a smoke run.
    """
    rows = [row for row in results.get("ours", []) if row.get("model_flop_per_second")]
    if results.get("tiny") or not rows:
        raise SystemExit("error: this file holds no step of a GPU\n  next: run benchmarks/gpu.py on one")
    usual = [row for row in rows if row["rows"] == 1 and row["length"] == 4096 and not row["recompute"]]
    row = max(usual or rows, key=lambda row: row["model_flop_per_second"])
    where = f"measured on {results['device']}, {results['date']}"
    return row["model_flop_per_second"], f"{where}, {row['rows']} x {row['length']} tokens"


# The check


def launch(ranks: int, folder: Path, said: Path) -> list[dict[str, Any]]:
    """What every rank of one launch under ZeRO-3 says, by rank."""
    said.mkdir(parents=True)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/zero3.yaml",
        "--num_processes", str(ranks), "--main_process_port", "0",
        str(Path(__file__).with_name("scaling_worker.py")), str(folder), str(said),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(said / "log", "w") as stream:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks failed:\n{(said / 'log').read_text(errors='replace')[:6000]}")
    return [json.loads((said / f"{rank}.json").read_text()) for rank in range(ranks)]


def fit_link(seconds: dict[int, float], ranks: int) -> tuple[float, float]:
    """(seconds a hop, bytes a second) of a ring, from the time of gathers by their size.

    The line through all sizes with the least relative errors: large gathers alone say nothing of small ones, and small ones
    nothing of large.
    """
    points = [(size, time, 1 / time**2) for size, time in seconds.items()]
    weight = sum(w for _, _, w in points)
    size, mean = (sum(w * point[n] for *point, w in points) / weight for n in (0, 1))
    slope = sum(w * (x - size) * (t - mean) for x, t, w in points) / sum(w * (x - size) ** 2 for x, _, w in points)
    slope = max(slope, 1e-15)
    return max(0.0, mean - slope * size) / (ranks - 1), (ranks - 1) / ranks / slope


def predict(
    base: BaseShapes, job: JobConfig, ranks: int, alone: float, overhead: float, links: dict[str, Any]
) -> tuple[Machine, StepTime]:
    """A step of ZeRO-3 from one process' step, the hooks' cost of a gather, and the links."""
    tokens = job.data.max_length
    flop = sum(work.flop for work in passes(base, job, tokens, tokens, recompute=False))
    hop, rate = fit_link({int(size): seconds for size, seconds in links["gather_seconds"].items()}, ranks)
    machine = Machine(
        flop_per_second=flop / alone,
        memory_bytes_per_second=2 * links["copy_bytes_per_second"],
        gpus_per_node=ranks,
        inner_bytes_per_second=rate,
        inner_hop_seconds=hop,
        gather_seconds=overhead,
        copy_bytes_per_second=links["copy_bytes_per_second"],
        overlap=0.0,
    )
    return machine, step_time(base, job, "zero3", ranks, machine, tokens=tokens, context=tokens, recompute=False)


def check(tokens: int, layers: int, runs: int) -> list[str]:
    """Measure, predict, compare; as lines of Markdown. Every second run goes from many ranks to one."""
    said: dict[int, list[list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        job = make_base(folder, tokens, layers)
        base = read_shapes(folder / "base")
        for number in range(runs):
            for ranks in (1, *RANKS) if number % 2 == 0 else (1, *RANKS)[::-1]:
                said.setdefault(ranks, []).append(launch(ranks, folder, folder / f"run-{number}-{ranks}"))
                print(f"run {number + 1}: {ranks} ranks", file=sys.stderr, flush=True)
    return compared(base, job, said)


def compared(base: BaseShapes, job: JobConfig, said: dict[int, list[list[dict[str, Any]]]]) -> list[str]:
    """Predicted beside measured, with what the prediction was made of."""
    tokens, one = job.data.max_length, seconds_of("step_seconds", said[1])
    gathers = sum(1 for work in passes(base, job, tokens, tokens, recompute=False) if work.gathered)
    overhead = max(0.0, one - seconds_of("alone_seconds", said[1])) / gathers
    lines = [
        "**The predictions are a model's.** Measured is beside them.",
        "",
        f"Base: {sum(t.num_elements for t in base.tensors) / 1e6:,.0f} M weights, NF4, r = 16 on all linear layers; "
        f"{tokens} tokens a rank; one thread a rank.",
        f"One process: {seconds_of('alone_seconds', said[1]):.2f} s a step; under ZeRO-3 on one rank {one:.2f} s, that is "
        f"{overhead * 1e3:.2f} ms for each of {gathers} gathers.",
        "",
        "| ranks | alone, s | hop, ms | GB/s | predicted gathers, s | predicted step, s | measured, s "
        "| predicted / measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        alone, measured = (seconds_of(key, said[ranks]) for key in ("alone_seconds", "step_seconds"))
        links = median_links([run[0] for run in said[ranks]])
        machine, time_of = predict(base, job, ranks, alone, overhead, links)
        cells = [
            f"{ranks}", f"{alone:.2f}", f"{machine.inner_hop_seconds * 1e3:.2f}",
            f"{machine.inner_bytes_per_second / 1e9:.2f}", f"{time_of.waited:.2f}", f"{time_of.total:.2f}",
            f"{measured:.2f}", f"**{time_of.total / measured:.2f}**",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    cores = len(os.sched_getaffinity(0))
    return [
        *lines,
        "",
        f"- alone: a process' own step while the other ranks do theirs, without a collective. On {cores} cores, "
        f"{max(RANKS)} ranks take turns, and a gather waits for ranks that are not running.",
        f"- hop and GB/s: of a line through the times of gathers of {', '.join(map(str, SIZES))} bytes.",
        f"- medians over the rounds of {len(said[1])} runs of what the slowest rank took; load of the machine at the end, "
        f"1 and 5 minutes: {', '.join(f'{x:.1f}' for x in os.getloadavg()[:2])}",
        f"- machine: {describe()}",
    ]


def median_links(said: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over runs of what rank 0 said of links and copying."""
    sizes = said[0]["gather_seconds"]
    return {
        "gather_seconds": {size: statistics.median(run["gather_seconds"][size] for run in said) for size in sizes},
        "copy_bytes_per_second": statistics.median(run["copy_bytes_per_second"] for run in said),
    }


def seconds_of(key: str, said: list[list[dict[str, Any]]]) -> float:
    """Median over the rounds of all runs of what the slowest rank took."""
    return statistics.median(max(times) for run in said for times in zip(*(rank[key] for rank in run), strict=True))


def main() -> None:
    """Predict, or check, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-results", type=Path, help="JSON of benchmarks/gpu.py: what one GPU does is taken from it")
    parser.add_argument("--tflops", type=float, default=MACHINE.flop_per_second / 1e12, help="of one GPU in a step; assumed")
    parser.add_argument("--inner", type=float, default=MACHINE.inner_bytes_per_second / 1e9, help="GB/s in a node; assumed")
    parser.add_argument(
        "--outer", type=float, default=MACHINE.outer_bytes_per_second / 1e9, help="GB/s across nodes; assumed"
    )
    parser.add_argument("--inner-hop", type=float, default=MACHINE.inner_hop_seconds * 1e6, help="µs; assumed")
    parser.add_argument("--outer-hop", type=float, default=MACHINE.outer_hop_seconds * 1e6, help="µs; assumed")
    parser.add_argument("--gpus-per-node", type=int, default=MACHINE.gpus_per_node)
    parser.add_argument("--gather-overhead", type=float, default=0.0, help="µs of the host for a gather; assumed")
    parser.add_argument(
        "--overlap", type=float, default=1.0, help="share of a gather's time beside the computation; assumed"
    )
    parser.add_argument("--tokens", type=int, default=CONTEXT, help="of a GPU's micro-step")
    parser.add_argument("--check", action="store_true", help="over gloo, on this machine")
    parser.add_argument("--check-tokens", type=int, default=256)
    parser.add_argument("--check-layers", type=int, default=30)
    parser.add_argument("--check-runs", type=int, default=3)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    positive = ("tflops", "inner", "outer", "gpus_per_node", "tokens", "check_tokens", "check_layers", "check_runs")
    if wrong := [name for name in positive if getattr(arguments, name) <= 0]:
        parser.error(", ".join(f"--{name.replace('_', '-')}" for name in wrong) + " must be above 0")
    if not 0 <= arguments.overlap <= 1 or min(arguments.inner_hop, arguments.outer_hop, arguments.gather_overhead) < 0:
        parser.error("--overlap is a share between 0 and 1; hops and --gather-overhead are not below 0")
    if arguments.gpu_results is not None and not arguments.gpu_results.is_file():
        parser.error(f"--gpu-results {arguments.gpu_results}: no such file")
    if arguments.check:
        lines = check(arguments.check_tokens, arguments.check_layers, arguments.check_runs)
    else:
        lines = predicted_lines(arguments)
    title = "The scaling model against gloo ranks" if arguments.check else "Scaling, by a model"
    report(arguments.results, title, __file__, lines)


if __name__ == "__main__":
    main()
