"""What every result has to say of where it was measured, and how results are written down."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "deepspeed", "peft", "trl")


def describe() -> str:
    """Processor, cores, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}; {', '.join(found)}"


def write_results(path: Path, title: str, script: str, lines: list[str]) -> None:
    """Write a results file: title, date, command, lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    head = [f"# {title}", "", f"`python benchmarks/{Path(script).name}`, {date}", ""]
    path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
