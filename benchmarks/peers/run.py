"""One arm in a fresh process, and a pair of them."""

from __future__ import annotations

import compileall
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine, describe_packages

from peers import pairs, quiet, workload
from peers.rows import Row

ROOT = Path(__file__).parents[2]
# With glibc's defaults large buffers go back to the kernel at every free and come back as fresh pages. Both arms get these.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
LIMIT_SECONDS = 1800


class ArmFailed(Exception):
    """An arm's process ended with an error; the message has the end of what it wrote."""


def prepare(row: Row, cache: Path, layers: int) -> tuple[Path, dict[str, dict[str, Any]], float]:
    """Make what the arms of a row need. Returns the base, each arm's settings, and the operations of a timed step."""
    # As an installer leaves a package, and has left the other side's. Python does it by itself too, unless told not to.
    compileall.compile_dir(str(ROOT / "qlora"), quiet=2)
    base = workload.make_base(cache, layers)
    data = workload.make_data(cache)
    found = {}
    flop = 0.0
    for name, own in row.arms.items():
        settings = row.settings | own
        if "data" in settings:
            settings["data"] = str(data[row.settings["data"]])
            settings["steps_file"] = str(cache / f"steps_{row.name}_{own['side']}_{settings['packs']}.jsonl")
            with tempfile.TemporaryDirectory() as folder:
                workload.write_steps(base, settings, Path(folder), Path(settings["steps_file"]))
            steps = workload.read_steps(Path(settings["steps_file"]))[settings["warmup"] :]
            if steps and not flop:
                flop = sum(workload.step_flop(step, workload.shape_of(layers)) for step in steps) / len(steps)
        found[name] = settings
    return base, found, flop


def run_arm(script: Path, base: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One arm in a process of its own, under accelerate's launcher where it has ranks. Raises ArmFailed."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        job = {"base": str(base), "settings": settings, "folder": text, "out": str(folder / "out.json")}
        (folder / "arm.json").write_text(json.dumps(job))
        command = [sys.executable]
        if settings.get("ranks"):
            launch = ROOT / "launch" / "accelerate" / f"{settings['launch']}.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
            command += ["--num_processes", str(settings["ranks"])]
        command += [str(script), "--arm", str(folder / "arm.json")]
        environment = os.environ | ALLOCATOR | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "datasets")}
        environment["OMP_NUM_THREADS"] = str(settings.get("threads") or len(os.sched_getaffinity(0)))
        environment["QLORA_BENCH_STARTED"] = repr(time.time())
        log = folder / "log"
        with open(log, "w") as stream:
            code = subprocess.run(
                command, env=environment, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False,
                timeout=LIMIT_SECONDS,
            ).returncode  # fmt: skip
        if code or not (folder / "out.json").is_file():
            raise ArmFailed(f"code {code}:\n{log.read_text()[-3000:]}")
        result: dict[str, Any] = json.loads((folder / "out.json").read_text())
        return result


def do_arm(path: Path) -> int:
    """In the arm's process: do what the file says and write what was found. Returns the exit code."""
    job = json.loads(path.read_text())
    settings = job["settings"]
    folder = Path(job["folder"])
    if settings["side"] == "ours":
        from peers import ours as side
    else:
        from peers import theirs as side  # type: ignore[no-redef]
    found = getattr(side, settings["run"])(Path(job["base"]), settings, folder)
    if os.environ.get("RANK", "0") == "0":
        out = Path(job["out"])
        out.with_suffix(".part").write_text(json.dumps(found))
        out.with_suffix(".part").rename(out)
    if settings.get("ranks"):
        from qlora.distributed.leave import leave

        leave(0)
    return 0


def run_pair(
    row: Row, number: int, script: Path, cache: Path, *, layers: int, campaign: str, best: float, most_below: float,
    say: Callable[[str], None],
) -> pairs.Record:  # fmt: skip
    """Both arms of a row, the machine's rate before, between and after them, and whether the pair counts.

    Args:
        number: of the pair; odd ones run the second arm first.
        layers: of the base; fewer than a row needs are for trying things out, and such a pair does not count.
        best: the best rate of the product that this machine has shown.
        most_below: how far below that a rate may be.
    """
    base, settings, flop = prepare(row, cache, layers)
    names = tuple(settings)
    others = quiet.Others()
    rates = [quiet.product_rate()]
    arms: dict[str, dict[str, Any]] = {}
    sequence = pairs.order(number, (names[0], names[1]))
    for name in sequence:
        arms[name] = run_arm(script, base, settings[name])
        rates.append(quiet.product_rate())
        say(f"  {name:22} {shown(arms[name])}  product {rates[-1] / 1e9:.0f} GFLOP/s")
    arms = {name: arms[name] for name in names}
    share = others.share()
    return {
        "row": row.name,
        "campaign": campaign,
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_packages(),
        "code": code_hash(),
        "layers": layers,
        "order": sequence,
        "settings": {key: value for key, value in row.settings.items() if key != "data"},
        "step_flop": flop,
        "product_rates": rates,
        "others_share": share,
        "most_below": most_below,
        "quiet": quiet.is_quiet(rates, max(best, *rates), share, most_below),
        "refusals": pairs.refusals(row, arms),
        "arms": arms,
    }


def shown(arm: dict[str, Any]) -> str:
    """The single numbers of what an arm found, in a line."""
    numbers = {key: value for key, value in arm.items() if isinstance(value, int | float)}
    text = "  ".join(f"{key} {value:,.4g}" for key, value in numbers.items())
    losses = arm.get("losses")
    return text + (f"  losses {losses[0]:.4f} .. {losses[-1]:.4f}" if losses else "")


def code_hash() -> str:
    """Of this package's source: pairs of one campaign that have different ones were measured on different code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "qlora").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
