"""This project against TRL + PEFT on CPUs: speed, memory, starting, loading, saving, evaluating, and two ranks against one.

A base of SmolLM2-135M's shape (random weights, NF4 with double quantization, bf16 compute), r=16 on all linear layers, one
learning rate, one seed. Each arm is a fresh process, with the same allocator settings, all cores, and two warm-up steps left
out; pairs run in the order A B B A. Both sides compute the same packs at every step, and a pair whose losses differ by more
than 1%, at any step, or that has a gradient of zero, does not count (padded against packed: the loss of the first step,
before any update). Useful tokens are those that are not padding; time is the wall clock from step to step. Memory is the
peak of a process of its own above what it holds when training begins. A matrix product timed between the runs tells
whether other jobs disturbed them; a disturbed pair is tried again.

    python benchmarks/against_trl.py [--rows packed,long2k | all] [--pairs 5]

Every pair is a line of benchmarks/results/raw/against_trl_MACHINE.jsonl, so that a run that was cut short goes on with what
is missing, and more pairs can be added later under the same --campaign. `python benchmarks/readme_table.py` makes the table
in README.md of it. Needs `pip install -e '.[bench]' -c constraints.txt`.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from functools import partial
from pathlib import Path

WAIT_SECONDS = 20


def main() -> int:
    """Run what is missing, print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="quick", help="names with commas, `quick` (the default) or `all`")
    parser.add_argument("--list", action="store_true", help="the rows, and what they are")
    parser.add_argument("--pairs", type=int, default=5, help="quiet pairs that a row is to have in the end")
    parser.add_argument("--tries", type=int, default=3, help="how often a pair is tried for a quiet one")
    parser.add_argument("--most-below", type=float, default=0.10, help="how far a product's rate may be below the best")
    parser.add_argument("--campaign", default=datetime.date.today().isoformat(), help="pairs of one name are read together")
    parser.add_argument("--raw", type=Path, help="the file of pairs")
    parser.add_argument("--cache", type=Path, help="where bases and data are made (default: ~/.cache/qlora-bench)")
    parser.add_argument("--layers", type=int, default=30, help="fewer to try things out: such pairs do not count")
    parser.add_argument("--results", type=Path, help="write what is there as Markdown")
    parser.add_argument("--arm", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        from peers.run import do_arm

        return do_arm(arguments.arm)
    from machine import report, slug
    from peers import pairs, quiet, run, workload
    from peers.rows import MEASURED, QUICK, ROWS
    from readme_table import table

    if arguments.list:
        for name in MEASURED:
            print(f"{name:12} {ROWS[name].title}")
        return 0
    if arguments.pairs < 1 or arguments.tries < 1 or arguments.layers < 1:
        parser.error("--pairs, --tries and --layers are at least 1")
    names = {"quick": QUICK, "all": MEASURED}.get(arguments.rows) or tuple(arguments.rows.split(","))
    if unknown := [name for name in names if name not in MEASURED]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(MEASURED)}")
    raw = arguments.raw or Path(__file__).parent / "results" / "raw" / f"against_trl_{slug()}.jsonl"
    cache = arguments.cache or workload.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    tries = arguments.tries if arguments.layers == pairs.LAYERS else 1
    failed = set()
    for number in range(arguments.pairs):
        for name in names:
            row = ROWS[name]
            if name in failed or number >= 1 == row.min_pairs:
                continue
            for attempt in range(tries):
                records = pairs.read(raw)
                num_there = sum(r["campaign"] == arguments.campaign for r in pairs.counted(records, row))
                if num_there > number:
                    break
                if attempt:
                    time.sleep(WAIT_SECONDS)
                print(f"{name}, pair {num_there + 1}", flush=True)
                try:
                    record = run.run_pair(
                        row, num_there, Path(__file__).resolve(), cache, layers=arguments.layers,
                        campaign=arguments.campaign, best=quiet.best_rate(records, run.describe_machine()),
                        most_below=arguments.most_below, say=partial(print, flush=True),
                    )  # fmt: skip
                except run.ArmFailed as error:
                    print(f"  {error}", flush=True)
                    failed.add(name)
                    break
                pairs.append(raw, record)
                for refusal in record["refusals"]:
                    print(f"  does not count: {refusal}", flush=True)
                if not record["quiet"] and row.is_time:
                    print(f"  disturbed: others had {record['others_share']:.0%} of the cores", flush=True)
    lines = table(pairs.read(raw))
    report(arguments.results, "Against TRL + PEFT", __file__, lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
