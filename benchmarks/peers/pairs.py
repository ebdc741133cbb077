"""From pairs of runs to a ratio: which pairs count, and what they say together.

A pair is one line of a file in `results/raw`: both arms of one row, run one after the other. The order changes from pair to
pair (A B B A), so that what drifts hits both. Pairs of one row, campaign and machine are read together; the median of
their ratios is what a row shows, with the quartiles.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import quiet
from peers.rows import ROWS, Row
from peers.workload import SHAPE

Record = dict[str, Any]
LAYERS = SHAPE["num_hidden_layers"]


@dataclass(frozen=True)
class Summary:
    """What the pairs of a row show. `first` and `second` are medians of the two arms."""

    row: Row
    machine: str
    campaign: str
    num_pairs: int
    first: float
    second: float
    ratio: float
    low: float
    high: float
    versions: str


def read(path: Path) -> list[Record]:
    """The lines of a file, none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def append(path: Path, record: Record) -> None:
    """Add a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def refusals(row: Row, arms: dict[str, dict[str, Any]]) -> list[str]:
    """Why a pair does not count: an arm that learns nothing, or two that do not learn the same."""
    found = []
    for name, arm in arms.items():
        if row.gate in ("each step", "first step") and (not arm.get("norms") or min(arm["norms"]) <= 0):
            found.append(f"{name}: a gradient norm is zero, or there is none")
    if found or row.gate == "none":
        return found
    first, second = (arm["losses"] for arm in arms.values())
    if row.gate == "first step":
        first, second = first[:1], second[:1]
    if len(first) != len(second):
        return [f"the arms made {len(first)} and {len(second)} steps"]
    for step, (a, b) in enumerate(zip(first, second, strict=True), start=1):
        if abs(a / b - 1) > row.loss_tolerance:
            found.append(f"step {step}: losses {a:.5f} and {b:.5f} are not within {row.loss_tolerance:.0%}")
    return found


def order(number: int, names: tuple[str, str]) -> tuple[str, str]:
    """Who runs first in a pair: A B, B A, A B, ..."""
    return names if number % 2 == 0 else (names[1], names[0])


def counted(records: Sequence[Record], row: Row) -> list[Record]:
    """The pairs that a row is made of: of the whole base, not refused, and quiet where its figure is a time.

    All pairs of a campaign are judged by one limit, the widest that was asked for in it, and by the best rate that their
    machine has shown in all of `records`, whatever was known when they were run.
    """
    source = row.source or row.name
    best: dict[str, float] = {}
    limits: dict[str, float] = {}
    for r in records:
        best[r["machine"]] = max(best.get(r["machine"], 0.0), *r["product_rates"])
        limits[r["campaign"]] = max(limits.get(r["campaign"], 0.0), r.get("most_below", quiet.MOST_BELOW))

    def is_quiet(r: Record) -> bool:
        return quiet.is_quiet(r["product_rates"], best[r["machine"]], r["others_share"], limits[r["campaign"]])

    whole = (r for r in records if r["row"] == source and r["layers"] == LAYERS and not r["refusals"])
    return [r for r in whole if not row.is_time or is_quiet(r)]


def values(row: Row, record: Record) -> tuple[float, float]:
    """The figures of the two arms of a pair, the row's first one first."""
    if row.derive is not None:
        return row.derive(record)
    first, second = (float(record["arms"][name][row.metric]) for name in row.arms)
    return first, second


def summarize(records: list[Record], row: Row) -> Summary | None:
    """The latest campaign of a row that has enough pairs, or None."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in counted(records, row):
        groups.setdefault((record["campaign"], record["machine"]), []).append(record)
    for (campaign, machine), group in sorted(groups.items(), reverse=True):
        if len(group) < row.min_pairs:
            continue
        pairs = [values(row, record) for record in group]
        ratios = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
        versions = group[-1]["versions"]
        return Summary(row, machine, campaign, len(group), first, second, statistics.median(ratios), low, high, versions)
    return None


def summaries(records: list[Record]) -> list[Summary]:
    """Every row that was measured often enough."""
    return [found for row in ROWS.values() if (found := summarize(records, row)) is not None]
