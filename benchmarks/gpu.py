"""One GPU, under eight minutes: what a step takes, next to what the device can do and next to others.

First the ceilings, in the same run: bf16 matrix products and a copy. Then Llama-3.1-8B's shape with random weights made on
the device and quantized layer by layer (no download): tokens/s, model TFLOP/s as a share of the measured product, allocated
and reserved memory, with and without recomputation; where a step's time goes, by kernel; the longest document that fits;
TRL + PEFT at its defaults and at its best, Liger and Unsloth where they are installed; and the same base in 16 bits.

Every part is a process of its own with a time limit, and what it found is written at once, to NAME.json and NAME.md. Parts
for which no time is left are named. Without a GPU nothing is measured and the exit code is 2; `--tiny --device cpu` runs all
of it on a shape that means nothing, to see that it runs.

    python benchmarks/gpu.py [--minutes 8] [--parts ceilings,steps,...] [--set train.KEY=VALUE] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_report
import yaml
from machine import describe

from qlora.config.load import load_config
from qlora.errors import EXIT_USER_ERROR, QloraError

ROOT = Path(__file__).resolve().parents[1]
# The same for every arm.
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TOKENIZERS_PARALLELISM": "false"}
# Asked of another process: a context of this one's would take half a gigabyte of the device.
ASK = (
    "import json, torch; there = torch.cuda.is_available(); found = torch.cuda.get_device_properties(0) if there else None; "
    "print(json.dumps([found.name, found.total_memory] if there else None))"
)


class Run:
    """The parts of one run: each in a process of its own, until the time is up; the results so far on disk."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, device: str, device_bytes: int) -> None:
        self.arguments, self.folder, self.device_bytes = arguments, folder, device_bytes
        self.end = time.monotonic() + 60 * arguments.minutes
        date = datetime.date.today().isoformat()
        self.results: dict[str, Any] = {
            "device": device,
            "date": date,
            "tiny": arguments.tiny,
            "notes": [],
            "set": arguments.set,
        }
        self.results["machine"] = describe()
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.out = arguments.results / f"gpu_{name}_{date}"

    def note(self, text: str) -> None:
        """Say what is missing, here and in the results."""
        print(f"  {text}", flush=True)
        self.results["notes"].append(text)
        self.write()

    def write(self) -> None:
        """Everything found so far."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.with_suffix(".json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        self.out.with_suffix(".md").write_text("\n".join(gpu_report.lines(self.results)) + "\n", encoding="utf-8")

    def child(self, key: str, kind: str, spec: dict[str, Any], *, most: float) -> list[dict[str, Any]]:
        """Run one part and add its rows to `results[key]`. A part that fails or takes too long is a note, not the end."""
        left = self.end - time.monotonic()
        label = f"{kind} {spec.get('label', '')}".strip()
        if left < min(most, self.arguments.least_seconds):
            self.note(f"{label}: no time was left")
            return []
        print(f"{label} ({left:.0f} s left)", flush=True)
        spec = spec | {"folder": str(self.folder), "device": self.arguments.device, "started": time.time()}
        if self.arguments.one_process:
            rows: list[dict[str, Any]] = []
            gpu_parts.work(kind, spec, rows.append)
            self.results.setdefault(key, []).extend(rows)
            self.write()
            return rows
        said, log = self.folder / "said.jsonl", self.folder / "log"
        said.unlink(missing_ok=True)
        command = [sys.executable, str(Path(gpu_parts.__file__)), kind, json.dumps(spec), str(said)]
        environment = os.environ | ENVIRONMENT
        if self.arguments.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        limit = min(most, left)
        with open(log, "w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        rows = [json.loads(line) for line in said.read_text().splitlines()] if said.is_file() else []
        self.results.setdefault(key, []).extend(rows)
        if code is None:
            self.note(f"{label}: ended after {limit:.0f} s")
        elif code:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            self.note(f"{label}: failed ({' '.join(last)[:300]})")
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        self.write()
        return rows


def find_device(device: str) -> tuple[str, int] | None:
    """The device's name and bytes; None where there is none. A CPU's bytes are made up."""
    if device == "cpu":
        return "cpu", 1 << 30
    asked = subprocess.run([sys.executable, "-c", ASK], stdout=subprocess.PIPE, check=True)
    found = json.loads(asked.stdout.decode().splitlines()[-1])
    return tuple(found) if found else None


def main() -> int:
    """Run the parts. Returns 2 where there is no GPU, 1 where a part failed or found nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", default=",".join(gpu_parts.PLAN), help="of these, in this order")
    parser.add_argument("--pairs", type=int, default=2, help="times each peer's arm is run, interleaved with ours")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the job file, for our arms"
    )
    parser.add_argument("--least-seconds", type=float, default=25.0, help="a part is begun where so much time is left")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a shape that means nothing, to see that everything runs")
    parser.add_argument("--one-process", action="store_true", help="no part in a process of its own; for --tiny")
    parser.add_argument("--scratch", type=Path, help="where bases are written: 6 GB, and 16 GB more for the one in 16 bits")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    if device is None:
        print("benchmarks/gpu.py needs a CUDA GPU, and torch sees none here: nothing was measured", file=sys.stderr)
        return EXIT_USER_ERROR
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for --tiny alone")
    unknown = set(arguments.parts.split(",")) - set(gpu_parts.PLAN)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(gpu_parts.PLAN)}")
    if arguments.minutes < 0 or arguments.pairs < 1:
        parser.error("--minutes is not below 0, --pairs at least 1")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as text:
        (job := Path(text) / "job.yaml").write_text("{}\n")
        try:
            load_config(job, arguments.set)
        except QloraError as error:
            print(f"error: --set: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        arguments.set = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in arguments.set)}
        run = Run(arguments, Path(text), *device)
        for part in gpu_parts.PLAN:
            if part in arguments.parts.split(","):
                gpu_parts.PLAN[part](run)
    print(run.out.with_suffix(".md").read_text())
    return int(any("failed" in note for note in run.results["notes"]))


if __name__ == "__main__":
    sys.exit(main())
