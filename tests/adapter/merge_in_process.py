"""Merges every form in a process of its own and prints by how many bytes its memory rose.

merge_in_process.py ADAPTER SMALL_ADAPTER OUT
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from qlora.adapter.merge_files import run_merge
from qlora.adapter.merge_plan import FORMS


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    adapter, small, out = (Path(text) for text in sys.argv[1:])
    # What libraries take once is taken by a small merge before.
    for form in FORMS:
        run_merge(small, out / f"small-{form}", onto=form)
    for form in FORMS:
        # Each form for itself: what the heap kept of the one before is given back, and the high-water mark begins anew.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        run_merge(adapter, out / form, onto=form)
        print(form, status("VmHWM") - before)


if __name__ == "__main__":
    main()
