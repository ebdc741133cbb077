"""Writes the table of README.md from the files in benchmarks/results, between two marks. Nothing in it is typed.

    python benchmarks/readme_table.py [--check]

A row that has not been measured often enough is not in the table. --check writes nothing and ends with 1 where README.md
is not what the results make.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from peers import pairs

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- made by benchmarks/readme_table.py -->"
END = "<!-- end of what was made -->"
MIB = 1024 * 1024


def figure(value: float, unit: str) -> str:
    """A figure with its unit."""
    if unit == "MiB":
        return f"{value / MIB:,.0f} MiB" if value >= 100 * MIB else f"{value / MIB:,.1f} MiB"
    if unit == "share":
        return f"{value:.2f}"
    if unit == "s" and value < 10:
        return f"{value:.2f} s"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:,.1f} {unit}"


def table(records: list[pairs.Record]) -> list[str]:
    """The lines of the table, with machine and versions below; empty where nothing was measured often enough."""
    found = pairs.summaries(records)
    if not found:
        return []
    lines = [
        "| | this project | the other | ratio | quartiles | pairs | campaign |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        first = figure(one.first, one.row.unit)
        second = "" if one.row.unit == "share" else figure(one.second, one.row.unit)
        ratio = "" if one.row.unit == "share" else f"**{one.ratio:.3g}**"
        lines.append(
            f"| {one.row.title} | {first} | {second} | {ratio} | {one.low:.3g} to {one.high:.3g} | {one.num_pairs} "
            f"| {one.campaign} |"
        )
    machines = sorted({f"{one.machine}; {one.versions}" for one in found})
    return [*lines, "", *(f"Measured on {machine}." for machine in machines)]


def checkpoint_line(results: Path) -> str | None:
    """What checkpoints cost, from the latest result of checkpoints.py, or None."""
    files = sorted(results.glob("checkpoints_*.md"), key=lambda path: path.stem.rpartition("_")[2])
    for path in reversed(files):
        text = path.read_text(encoding="utf-8")
        rows = re.findall(r"^\| ([^|]+) \| ([\d.]+%) \| ([\d.]+%) \|", text, re.MULTILINE)
        interval = re.search(r"of (\d+) steps: held up", text)
        if rows and interval:
            parts = "; ".join(f"{place}: {held}, at most {most}" for place, held, most in rows)
            date = path.stem.rpartition("_")[2]
            said = f"{date}, `checkpoints.py`; two saves, beside other work"
            return f"Time lost to a checkpoint every {interval.group(1)} steps: {parts} ({said})."
    return None


def made(root: Path = ROOT) -> str:
    """What stands between the marks."""
    results = root / "benchmarks" / "results"
    records = [record for path in sorted((results / "raw").glob("against_trl_*.jsonl")) for record in pairs.read(path)]
    lines = table(records)
    checkpoints = checkpoint_line(results)
    return "\n".join([*lines, *([""] if lines and checkpoints else []), *([checkpoints] if checkpoints else [])])


def replaced(text: str, content: str) -> str:
    """A text with new content between the marks. Raises ValueError where there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{BEGIN} and {END} are not there")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = replaced(old, made())
    if arguments.check:
        if old != new:
            print("README.md is not what benchmarks/results make; run python benchmarks/readme_table.py", file=sys.stderr)
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
