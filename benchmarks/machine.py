"""What every result has to say of where it was measured, and how results are written down."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "deepspeed", "peft", "trl")


def describe() -> str:
    """Processor, cores, versions."""
    return f"{describe_machine()}, Python {platform.python_version()}; {describe_packages()}"


def describe_machine() -> str:
    """Processor and cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def describe_packages() -> str:
    """Versions of the packages that a figure depends on."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def slug() -> str:
    """The machine's name in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", describe_machine().lower()).strip("-")


def report(path: Path | None, title: str, script: str, lines: list[str]) -> None:
    """Print the lines of a result, and write a file of them where asked: title, date, command, lines."""
    print("\n".join(lines))
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    head = [f"# {title}", "", f"`python benchmarks/{Path(script).name}`, {date}", ""]
    path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
