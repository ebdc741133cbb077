"""Whether the machine was this benchmark's alone: a matrix product timed between the runs, and what others computed.

A run that another job slows down says nothing. Before, between and after the arms of a pair the rate of a product in
bfloat16 is measured, on all cores; a pair is quiet where none of the rates is far below the best that this machine has
shown, and where other processes and the host took little of the cores while the arms ran.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

SIZE, REPEATS = 2048, 15
MOST_BELOW, MOST_OTHERS = 0.10, 0.05


def product_rate() -> float:
    """Operations a second of a 2048 x 2048 x 2048 product in bfloat16: the median of some, after two."""
    import torch

    a, b = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / statistics.median(seconds[2:])


class Others:
    """The share of the cores that went to other processes, or that the host took away, since the start."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        numbers = [float(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, idle, wait, irq, softirq, steal = (n / os.sysconf("SC_CLK_TCK") for n in numbers)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(u.ru_utime + u.ru_stime for u in used)
        busy = user + nice + system + irq + softirq + steal
        return busy, busy + idle + wait, own

    def share(self) -> float:
        """Between 0 and 1. Children count as this process's own once they have ended."""
        busy, whole, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / whole) if whole > 0 else 0.0


def is_quiet(rates: list[float], best: float, others: float, most_below: float = MOST_BELOW) -> bool:
    """Whether a pair counts: its rates of the product, the best that was ever seen here, and the others' share."""
    return min(rates) >= (1 - most_below) * best and others <= MOST_OTHERS


def best_rate(records: list[dict[str, Any]], machine: str) -> float:
    """The best rate that a machine has shown, 0 where there is none."""
    return max((max(r["product_rates"]) for r in records if r["machine"] == machine), default=0.0)
