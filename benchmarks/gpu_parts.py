"""The parts of `gpu.py`: what each asks of a child process, and the child's own entry.

python benchmarks/gpu_parts.py KIND SPEC_JSON SAID_FILE
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_base import config_of

GIB = 1 << 30


def ceilings(run: Any) -> None:
    """What the device can do."""
    tiny = run.arguments.tiny
    spec = {
        "config": _config(run), "tokens": 64 if tiny else 4096, "repeats": 3 if tiny else 20,
        "copy_bytes": 1 << 20 if tiny else 1 << 30,
    }  # fmt: skip
    run.child("ceilings", "ceilings", spec, most=45)


def steps(run: Any) -> None:
    """Our steps, without recomputation and with it, and the kernels of one."""
    long, short = _points(run)
    warmup, number = _counts(run)
    base = _base(run)
    usual = {"base": base, "warmup": warmup, "steps": number, "config": _config(run), "set": run.arguments.set, "r": 16}
    run.child("ours", "sweep", usual | {"recompute": False, "points": [*short, *long], "kernels": long[0]}, most=110)
    run.child("ours", "sweep", usual | {"recompute": True, "points": [*short, *long], "label": "recomputing"}, most=110)


def peers(run: Any) -> None:
    """Others beside us: A B C, C B A, every arm a fresh process."""
    import gpu_peers

    arms = []
    for arm in gpu_peers.NEEDS:
        lacking = gpu_peers.missing(arm)
        if lacking:
            run.note(f"{arm}: {', '.join(lacking)} not installed")
        elif arm != "unsloth" or run.arguments.device == "cuda":
            arms.append(arm)
    warmup, number = _counts(run)
    rows, length = _points(run)[1][1]
    spec = {"base": _base(run), "warmup": warmup, "steps": number, "config": _config(run), "rows": rows, "length": length}
    for turn in range(run.arguments.pairs):
        for arm in arms if turn % 2 == 0 else arms[::-1]:
            # Ours at its default, which chooses what is recomputed.
            own = {"arm": arm, "r": 16, "recompute": "auto", "set": run.arguments.set, "label": arm}
            run.child("peers", "arm", spec | own, most=75)


def longest(run: Any) -> None:
    """The longest document, r = 32."""
    tiny = run.arguments.tiny
    config = _config(run)
    base = _base(run, layers=2)
    spec = {
        "base": base, "config": config, "r": 32, "seconds": 8 if tiny else 60, "first": 2048 if tiny else 65536,
        "most": 4096 if tiny else 1 << 20, "total_bytes": run.device_bytes, "set": run.arguments.set,
    }  # fmt: skip
    run.child("longest", "longest", spec, most=110)


def sixteen(run: Any) -> None:
    """The same base in 16 bits, at the longest point."""
    long, _ = _points(run)
    warmup, number = _counts(run)
    free = shutil.disk_usage(run.folder).free
    if not run.arguments.tiny and free < 20 * GIB:
        run.note(f"16 bits: {free / GIB:.0f} GiB free in {run.folder}, 20 are wanted; --scratch names another folder")
        return
    spec = {"base": _base(run, quantized=False), "quantized": False, "warmup": warmup, "steps": number, "r": 16}
    spec |= {"config": _config(run), "set": run.arguments.set, "recompute": False, "label": "16 bits"}
    run.child("ours", "sweep", spec | {"points": [long[-1]]}, most=90)


def wider(run: Any) -> None:
    """A step with r = 32."""
    long, _ = _points(run)
    warmup, number = _counts(run)
    spec = {"base": _base(run), "warmup": warmup, "steps": number, "config": _config(run), "set": run.arguments.set}
    run.child("ours", "sweep", spec | {"r": 32, "recompute": False, "points": [long[0]], "label": "r = 32"}, most=60)


PLAN: dict[str, Callable[[Any], None]] = {
    "ceilings": ceilings, "steps": steps, "peers": peers, "longest": longest, "sixteen": sixteen, "wider": wider,
}  # fmt: skip


def _config(run: Any) -> dict[str, Any]:
    return config_of("tiny" if run.arguments.tiny else "8b")


def _counts(run: Any) -> tuple[int, int]:
    """Steps that do not count, and that do."""
    return (1, 2) if run.arguments.tiny else (2, 6)


def _points(run: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(rows, length): one long document, the first of them the usual; and shorter ones."""
    if run.arguments.tiny:
        return [(1, 128), (1, 192)], [(1, 48), (2, 64)]
    return [(1, 4096), (1, 8192)], [(1, 1024), (2, 2048)]


def _base(run: Any, *, layers: int | None = None, quantized: bool = True) -> str:
    """The folder of a base, made when it is first asked for."""
    folder = run.folder / f"base-{layers or 'whole'}-{'nf4' if quantized else 'bf16'}"
    if not folder.exists():
        config = config_of("tiny" if run.arguments.tiny else "8b", layers)
        run.child("bases", "base", {"base": str(folder), "config": config, "quantized": quantized}, most=150)
    return str(folder)


def work(kind: str, spec: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Do one thing, and tell of every row as it is found."""
    if kind == "base":
        import torch
        from gpu_base import make_base

        found = make_base(Path(spec["base"]), spec["config"], torch.device(spec["device"]), quantized=spec["quantized"])
        say({"layers": spec["config"]["num_hidden_layers"], "quantized": spec["quantized"], **found})
    elif kind == "longest":
        from gpu_longest import longest

        longest(spec, say)
    elif kind == "arm":
        from gpu_peers import arm

        arm(spec, say)
    else:
        import gpu_ours

        {"ceilings": gpu_ours.ceilings, "sweep": gpu_ours.sweep}[kind](spec, say)


def child() -> None:
    """What runs in a process of its own: rows are appended to a file as they are found."""
    said = Path(sys.argv[3])

    def say(row: dict[str, Any]) -> None:
        with open(said, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    work(sys.argv[1], json.loads(sys.argv[2]), say)


if __name__ == "__main__":
    child()
