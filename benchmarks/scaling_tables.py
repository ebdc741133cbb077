"""The tables of docs/scaling.md, computed from shapes. A model, not a measurement: no GPU is asked.

Shapes are the public config.json of three bases, typed in below; bytes and times come from `qlora.plan`; link speeds and
arithmetic speed are the assumptions stated here (`benchmarks/scaling.py` takes others, and checks the model over gloo).
Tables stand in the document between `<!-- table NAME -->` and `<!-- end -->`.

    python benchmarks/scaling_tables.py            # writes the tables into docs/scaling.md
    python benchmarks/scaling_tables.py --check    # says whether they are what this script computes
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

from qlora.config.schema import JobConfig
from qlora.plan.gathers import gathered_bytes
from qlora.plan.memory import Mode, plan_rank
from qlora.plan.parameters import is_quantized, statistics_bytes, stored_parameters
from qlora.plan.shapes import BaseShapes, shapes_from_config
from qlora.plan.speed import Machine, flop_per_token, step_time

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/scaling.md"
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads; all: 8 key-value heads, 128,256 tokens, untied.
BASES = {
    "Llama-3.1-8B": (4096, 14336, 32, 32),
    "Llama-3.1-70B": (8192, 28672, 80, 64),
    "Llama-3.1-405B": (16384, 53248, 126, 128),
}
RANKS = (8, 16, 64, 128, 512)
# Assumptions, not measurements: 45 GB/s is a 400 Gb/s card for each GPU, between nodes; 360 GB/s NVLink, inside one.
MACHINE = Machine(flop_per_second=450e12, inner_bytes_per_second=360e9, outer_bytes_per_second=45e9)
GPU_BYTES = 80e9
ROOM = 0.9  # of it, for what a plan counts
CONTEXT = 4096  # tokens of a micro-step, one document
JOB = JobConfig.model_validate({"data": {"max_length": CONTEXT}})  # r = 16, all-linear, NF4 with double quantization
JOB_16_BIT = JobConfig.model_validate({"model": {"quantization": None}})


def shapes(name: str) -> BaseShapes:
    """The tensors of one of BASES."""
    hidden, ffn, layers, heads = BASES[name]
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}
    return shapes_from_config(config, name)


def replicated_statistics(base: BaseShapes) -> int:
    """Bytes of all statistics: what every rank keeps where they are not shared out with their weights."""
    quantization = JOB.model.quantization
    assert quantization is not None
    return sum(statistics_bytes(t.num_elements, quantization) for t in base.tensors if is_quantized(t, JOB))


def tables() -> dict[str, str]:
    """Every table by name, as Markdown."""
    bases = {name: shapes(name) for name in BASES}
    made = {"bases": _bases(bases)}
    for name, base in bases.items():
        key = name.rpartition("-")[2].lower()
        made[f"kept-{key}"] = _kept(base)
        made[f"gathered-{key}"] = _gathered(base)
        made[f"speed-{key}"] = speed_table(base, MACHINE, CONTEXT)
    return made


def _bases(bases: dict[str, BaseShapes]) -> str:
    rows = []
    for name, base in bases.items():
        kept = plan_rank(base, JOB, "zero2", 8).kept
        at_once = plan_rank(base, JOB, "zero3", 8).working["gathered weights"]
        flop = [flop_per_token(base, JOB, CONTEXT, recompute=again) for again in (False, True)]
        rows.append([
            name, _count(sum(t.num_elements for t in base.tensors)), _gb(kept["packed weights"]), _gb(kept["statistics"]),
            _gb(kept["unquantized"]), _count(kept["trained"] // 4), _gb(sum(kept.values())), _gb(at_once),
            *(f"{value / 1e9:,.0f}" for value in flop), f"{flop[1] / MACHINE.flop_per_second * 1e6:,.0f}",
        ])  # fmt: skip
    head = ["base", "weights", "packed", "statistics", "16-bit", "LoRA parameters", "ZeRO-2 keeps, 8 ranks"]
    return _table([*head, "ZeRO-3 gathers at once", "GFLOP a token", "recomputing", "µs a token"], rows)


def _kept(base: BaseShapes) -> str:
    rows = []
    for ranks in RANKS:
        kept = plan_rank(base, JOB, "zero3", ranks).kept
        lora = sum(kept[key] for key in ("trained", "gradients", "optimizer", "fp32 master copy"))
        parts = [kept["packed weights"], kept["statistics"], kept["unquantized"], lora, kept["kept whole as well"]]
        replicated = sum(parts) - kept["statistics"] + replicated_statistics(base)
        rows.append([str(ranks), *map(_gb, parts), f"**{_gb(sum(parts))}**", _gb(replicated)])
    head = ["ranks", "packed", "statistics", "16-bit", "LoRA, all of it", "kept whole", "together", "statistics replicated"]
    return _table(head, rows)


def _gathered(base: BaseShapes) -> str:
    rows = []
    seconds_a_token = flop_per_token(base, JOB, CONTEXT, recompute=True) / MACHINE.flop_per_second
    for ranks in RANKS:
        four = plan_rank(base, JOB, "zero3", ranks).gathered
        sixteen = plan_rank(base, JOB_16_BIT, "zero3", ranks).gathered
        times = [four / MACHINE.outer_bytes_per_second, four / MACHINE.inner_bytes_per_second]
        tokens = [*(time / seconds_a_token for time in times), sixteen / MACHINE.outer_bytes_per_second / seconds_a_token]
        once = gathered_bytes(stored_parameters(base, JOB), recompute=False) * (ranks - 1) // ranks
        rows.append([
            str(ranks), _gb(once), _gb(four), *(f"{time:.2f} s" for time in times),
            *(f"{value:,.0f}" for value in tokens[:2]), _gb(sixteen), f"{tokens[2]:,.0f}",
        ])  # fmt: skip
    head = ["ranks", "two passes", "recomputing", "at 45 GB/s", "at 360 GB/s", "tokens to hide it, 45", "360"]
    return _table([*head, "16-bit base", "tokens to hide that, 45"], rows)


def speed_table(base: BaseShapes, machine: Machine, tokens: int) -> str:
    """Tokens a second of one GPU, and its efficiency against a GPU that waits for nobody, by number of GPUs."""
    columns: list[tuple[str, Mode, bool, Machine]] = [
        ("DDP, recomputing", "ddp", True, machine),
        ("ZeRO-1, recomputing", "zero1", True, machine),
        ("ZeRO-3, recomputing", "zero3", True, machine),
        ("ZeRO-3", "zero3", False, machine),
        ("ZeRO-3, recomputing, nothing overlaps", "zero3", True, replace(machine, overlap=0.0)),
    ]
    rows = []
    for ranks in RANKS:
        cells = [str(ranks)]
        for _, mode, recompute, own in columns:
            job = JobConfig.model_validate({"data": {"max_length": tokens}, "train": {"gradient_checkpointing": recompute}})
            time = step_time(base, job, mode, ranks, own, tokens=tokens, context=tokens)
            fits = plan_rank(base, job, mode, ranks).total_bytes <= ROOM * GPU_BYTES
            cells.append(f"{tokens / time.total:,.0f} ({time.efficiency:.1%})" if fits else "does not fit")
        rows.append(cells)
    return _table(["GPUs", *(name for name, *_ in columns)], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gb(num_bytes: float) -> str:
    """Gigabytes (1e9), as link speeds are given, or megabytes."""
    size, unit = (num_bytes / 1e9, "GB") if num_bytes >= 1e8 else (num_bytes / 1e6, "MB")
    return f"{size:,.{0 if size >= 100 else 1 if size >= 10 else 2}f} {unit}"


def _count(number: int) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.0f} M"


def filled(text: str) -> str:
    """Return the document with every table in its place. Raises ValueError where a place is missing or left over."""
    made = tables()
    places = re.findall(r"<!-- table (\S+) -->", text)
    if sorted(places) != sorted(made):
        raise ValueError(f"the document has places for {sorted(places)}, the tables are {sorted(made)}")
    for name, table in made.items():
        pattern = rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """Write the tables, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8")
    after = filled(before)
    if arguments.check:
        print("the same" if after == before else "the tables in docs/scaling.md are not what is computed")
        return int(after != before)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
