"""What `gpu.py` found, as Markdown. Rows that do not count say why."""

from __future__ import annotations

import statistics
from typing import Any

GIB = 1 << 30
ALLOWED = 0.01  # by which mean losses of arms may differ


def lines(results: dict[str, Any]) -> list[str]:
    """The whole document."""
    found = [
        f"# One GPU: {results['device']}", "", f"`python benchmarks/gpu.py`, {results['date']}", "",
        *(["**A smoke run on a tiny shape: no figure here means anything.**", ""] if results["tiny"] else []),
        *([f"Job keys: {results['set']}", ""] if results["set"] else []),
    ]  # fmt: skip
    product = None
    for row in results.get("ceilings", [])[:1]:
        product = row["product_flop_per_second"]
        found += _ceilings(row)
    steps = [row for row in results.get("ours", []) if "kernels" not in row]
    if steps:
        found += _steps(steps, product)
    found += _sixteen(steps)
    if results.get("peers"):
        found += _peers(results["peers"])
    if results.get("longest"):
        found += _longest(results["longest"])
    for row in results.get("ours", []):
        if "kernels" in row:
            found += _kernels(row["kernels"])
    if results["notes"]:
        found += ["## What is missing, and why", "", *(f"- {note}" for note in results["notes"]), ""]
    if results.get("machine"):
        found.append(f"Machine: {results['machine']}")
    return found


def _ceilings(row: dict[str, Any]) -> list[str]:
    return [
        "## What the device can do", "",
        *(f"- bf16 product {shape}: {rate / 1e12:,.1f} TFLOP/s" for shape, rate in row["products"].items()),
        f"- copy: {row['copy_bytes_per_second'] / 1e9:,.0f} GB/s, read and written",
        f"- NF4 to bf16: {row['dequantized_weights_per_second'] / 1e9:,.1f} G weights/s", "",
    ]  # fmt: skip


def _steps(steps: list[dict[str, Any]], product: float | None) -> list[str]:
    table = [
        "## Steps", "", "Share: model FLOP (no recomputation counted) a second over the fastest product above.", "",
        "| base | r | rows x length | layers recomputed | tokens/s | s a step | TFLOP/s | share | allocated, GiB "
        "| reserved, GiB | loss |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in steps:
        cells = ["NF4" if row["quantized"] else "bf16", str(row["r"]), f"{row['rows']} x {row['length']:,}"]
        cells.append(str(row["recomputed_layers"]))
        if row.get("out_of_memory"):
            cells += ["does not fit", *[""] * 6]
        elif row["smallest_norm"] <= 0:
            cells += ["does not count: a gradient norm is zero", *[""] * 6]
        else:
            flop = row["model_flop_per_second"]
            cells += [
                f"{row['tokens_per_second']:,.0f}", f"{row['step_seconds']:.3f}", f"{flop / 1e12:,.1f}",
                f"{flop / product:.1%}" if product else "", _gib(row["max_allocated_bytes"]),
                _gib(row["max_reserved_bytes"]), f"{row['losses'][0]:.3f}",
            ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return [*table, ""]


def _sixteen(steps: list[dict[str, Any]]) -> list[str]:
    """4 bits over 16, at the same point."""
    timed = {(r["quantized"], r["rows"], r["length"], r["r"], r["recompute"]): r for r in steps if "tokens_per_second" in r}
    found = []
    for (quantized, *point), row in timed.items():
        beside = timed.get((True, *point))
        if not quantized and beside is not None:
            ratio = beside["tokens_per_second"] / row["tokens_per_second"]
            found = [f"**NF4 over bf16, {point[0]} x {point[1]:,} tokens: {ratio:.3f}** of its tokens/s", ""]
    return found


def _peers(rows: list[dict[str, Any]]) -> list[str]:
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    table = [
        "## Beside others", "",
        "Medians over processes; the ratio is that of neighbours in the order they ran. Same document, base, r and rows.",
        "", "| | tokens/s | layers recomputed | allocated, GiB | start to first step, s | mean loss | ours / this |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    own = [row for row in arms.get("ours", []) if "losses" in row]
    for arm, runs in arms.items():
        done = [row for row in runs if "losses" in row]
        if not done:
            table.append(f"| {arm} | does not fit | | | | | |")
            continue
        cells = [
            arm, f"{_median(done, 'tokens_per_second'):,.0f}", str(done[0]["recomputed_layers"]),
            _gib(_median(done, "max_allocated_bytes")), f"{_median(done, 'first_step_seconds'):.1f}",
            f"{_mean_loss(done):.4f}", _verdict(own, done) if arm != "ours" else "",
        ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return [*table, ""]


def _verdict(own: list[dict[str, Any]], done: list[dict[str, Any]]) -> str:
    """The median of paired ratios, or why there is none."""
    if not own:
        return "no run of ours beside it"
    if min(row["smallest_norm"] for row in (*own, *done)) <= 0:
        return "does not count: a gradient norm is zero"
    difference = abs(_mean_loss(done) / _mean_loss(own) - 1)
    if difference > ALLOWED:
        return f"does not count: losses differ by {difference:.1%}"
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(own, done, strict=False)]
    spread = f", {min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
    return f"**{statistics.median(ratios):.2f}** ({len(ratios)} pairs{spread})"


def _longest(rows: list[dict[str, Any]]) -> list[str]:
    fits = max((row["length"] for row in rows if row["fits"]), default=0)
    fails = min((row["length"] for row in rows if not row["fits"]), default=None)
    tries = ", ".join(f"{row['length']:,} {'fits' if row['fits'] else 'does not'} ({row['seconds']:.0f} s)" for row in rows)
    return [
        f"## Longest document, r = {rows[0]['r']}", "",
        f"**{fits:,} tokens fit**" + (f", {fails:,} do not" if fails else "") + ". "
        f"{rows[0]['layers_computed']} layers were computed; what the others keep (weights, adapters, moments, inputs of "
        "recomputed layers) was allocated beside them.", "", f"Tried: {tries}", "",
    ]  # fmt: skip


def _kernels(found: dict[str, Any]) -> list[str]:
    busy, wall = found["busy_seconds"], found["wall_seconds"]
    return [
        "## Where a step's time goes", "",
        f"{found['launches']:,} launches, {busy:.3f} s in them; the step took {wall:.3f} s with the profiler.",
        "",
        "| kernel | calls | ms | share |", "|---|---:|---:|---:|",
        *(
            f"| `{row['name'][:90].replace('|', ' ')}` | {row['calls']:,} "
            f"| {row['seconds'] * 1e3:,.2f} | {row['share']:.1%} |"
            for row in found["top"]
        ),
        "",
    ]  # fmt: skip


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _mean_loss(rows: list[dict[str, Any]]) -> float:
    return statistics.mean(statistics.mean(row["losses"]) for row in rows)


def _gib(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.2f}"
