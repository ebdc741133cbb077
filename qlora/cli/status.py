"""`qlora status`: where a run stands, from the files it writes and the lock it holds."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.failures import DebugOption
from qlora.cli.rows import print_json, print_rows
from qlora.config.paths import missing_hint
from qlora.errors import QloraError

_STEP_FOLDER = re.compile(r"step-(\d+)")
_TAIL_BYTES = 1 << 18  # more rows than lie between two evaluations of most runs
_SMALL_FILE_BYTES = 1 << 20


def status(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run directory (train.output_dir).", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show where a run stands: step, loss, last checkpoint, how it ended.

    A run that says it is running while nobody holds its lock has died, and is shown as failed.
    """
    facts = read_status(run_dir)
    if as_json:
        print_json(facts)
    else:
        print_rows(_rows(facts))


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return what `--json` prints. Raises QloraError where the folder is no run directory.

    `state` is running, done, stopped or failed; `recorded_state` is what status.json says, None where there is none.
    """
    if not run_dir.is_dir():
        raise QloraError("no such run directory", place=str(run_dir), next_step=missing_hint(run_dir))
    if not any((run_dir / name).exists() for name in ("status.json", "metrics.jsonl", "LOCK")):
        inside_run = run_dir.absolute().parent.name == "checkpoints"
        raise QloraError(
            "not a run directory",
            place=str(run_dir),
            found="no status.json, no metrics.jsonl, no LOCK",
            next_step=f"qlora status {run_dir.parent.parent}" if inside_run else None,
        )
    recorded = _read_object(run_dir / "status.json") or {}
    alive = lock_is_held(run_dir / "LOCK")
    owner = _read_object(run_dir / "LOCK") if alive else None
    if owner and any(key in recorded and recorded[key] != owner.get(key) for key in ("host", "pid")):
        recorded = {}  # by an earlier start: this one has not come to its first step yet
    checkpoints = committed_checkpoints(run_dir)
    row, eval_row = last_rows(run_dir / "metrics.jsonl")
    facts: dict[str, Any] = {
        "run_dir": str(run_dir),
        "state": recorded.get("state"),
        "recorded_state": recorded.get("state"),
        "owner_alive": alive,
        "owner": owner,
        "step": max((s for s in (recorded.get("step"), (row or {}).get("step")) if isinstance(s, int)), default=None),
        "num_steps": recorded.get("num_steps"),
        "exit_code": recorded.get("exit_code"),
        "reason": recorded.get("reason"),
        "resumable": recorded.get("resumable"),
        "last_row": row,
        "last_eval": eval_row,
        "last_checkpoint": {"step": checkpoints[-1][0], "path": str(checkpoints[-1][1])} if checkpoints else None,
        "num_checkpoints": len(checkpoints),
    }
    if recorded.get("state") in (None, "running"):
        facts["state"] = "running" if alive else "failed"
        if not alive:
            facts["reason"] = "the process is gone without a word: killed, or its machine went down"
            facts["resumable"] = bool(checkpoints)
    return facts


def committed_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of each complete checkpoint, ordered by step, which no clock can disturb."""
    found = []
    for folder in run_dir.glob("checkpoints/step-*"):
        match = _STEP_FOLDER.fullmatch(folder.name)
        if match and (folder / "COMMITTED").is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def last_rows(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the last training row and the last evaluation row of metrics.jsonl; a torn last line is passed over."""
    row = eval_row = None
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None, None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            row = entry if row is None and "loss" in entry else row
            eval_row = entry if eval_row is None and "eval_loss" in entry else eval_row
        if row is not None and eval_row is not None:
            break
    return row, eval_row


def lock_is_held(path: Path) -> bool:
    """Tell whether another process holds the operating system's lock on the file, of either kind (flock, fcntl).

    A shared lock is tried and given back at once; the file itself is not changed. Never call it in the process that holds
    the lock: closing a file gives up a process's own fcntl locks on it.
    """
    kinds: tuple[Callable[[int, int], object], ...] = (fcntl.flock, fcntl.lockf)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        for lock in kinds:
            try:
                lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without this kind of lock
                continue
            lock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
    return False


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_SMALL_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    row, eval_row, checkpoint = facts["last_row"] or {}, facts["last_eval"], facts["last_checkpoint"]
    rows = [("run", facts["run_dir"]), ("state", str(facts["state"]))]
    if facts["reason"]:
        rows.append(("reason", str(facts["reason"])))
    if facts["owner"]:
        rows.append(("owner", ", ".join(f"{key} {value}" for key, value in facts["owner"].items())))
    of_all = f" of {facts['num_steps']}" if facts["num_steps"] is not None else ""
    rows.append(("step", "none yet" if facts["step"] is None else f"{facts['step']}{of_all}"))
    labels = (("loss", "loss"), ("epoch", "epoch"), ("learning_rate", "learning rate"), ("tokens_per_second", "tokens/s"))
    rows += [(label, f"{row[key]:.6g}") for key, label in labels if isinstance(row.get(key), int | float)]
    if isinstance(row.get("time"), int | float):
        rows.append(("last row", f"{max(0.0, time.time() - row['time']):.0f} s ago"))
    if eval_row and isinstance(eval_row["eval_loss"], int | float):
        rows.append(("eval loss", f"{eval_row['eval_loss']:.6g} at step {eval_row.get('step')}"))
    rows.append(("last checkpoint", checkpoint["path"] if checkpoint else "none"))
    if facts["state"] != "running" and facts["exit_code"] is not None:
        rows.append(("exit code", str(facts["exit_code"])))
    if facts["resumable"] is not None and facts["state"] not in ("running", "done"):
        rows.append(("resumable", "yes" if facts["resumable"] else "no"))
    return rows
