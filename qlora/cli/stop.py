"""`qlora stop`: asks a running job to save and end, through a file in its run directory, from any machine that sees it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.failures import DebugOption
from qlora.cli.rows import print_rows
from qlora.cli.status import read_status
from qlora.errors import QloraError
from qlora.files import write_file
from qlora.train.run_dir import STOP_FILE

POLL_SECONDS = 0.2


def stop(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run directory (train.output_dir).", show_default=False)
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Come back when the job has ended.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="How long --wait waits at most.")
    ] = 600.0,
    force: Annotated[
        bool, typer.Option("--force", help="Ask although nobody seems to run there: where locks do not reach across nodes.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Ask a running job to save and end after its step, with exit code 75; the same job file then goes on from there.

    Other than a signal it reaches the job from every machine that shares the file system, and no launcher's time limit is
    set off by it.
    """
    facts = ask_to_stop(run_dir, force=force)
    owner = facts["owner"] or {}
    where = f" (host {owner['host']}, pid {owner['pid']})" if {"host", "pid"} <= owner.keys() else ""
    typer.echo(f"asked {run_dir}{where} to save and stop")
    if wait:
        ended = wait_for_end(run_dir, timeout)
        rows = [("state", ended["state"]), ("reason", ended["reason"]), ("step", ended["step"])]
        checkpoint = ended["last_checkpoint"]
        rows.append(("last checkpoint", checkpoint["path"] if checkpoint else "none"))
        print_rows([(label, str(value)) for label, value in rows if value is not None])


def ask_to_stop(run_dir: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the stop file for whoever holds the run directory. Returns what `read_status` says of the run.

    Raises:
        QloraError: there is no such run, it is not running, or its folder cannot be written to.
    """
    facts = read_status(run_dir)
    if not facts["owner_alive"] and not force:
        ended = facts["state"] if facts["state"] is not None else "no status.json"
        found = f"{ended}, step {facts['step']}" + (f": {facts['reason']}" if facts["reason"] else "")
        raise QloraError(
            "no job is running in this folder",
            place=str(run_dir),
            found=found,
            next_step="if it does run, on a file system whose locks do not reach other nodes: --force",
        )
    try:
        write_file(run_dir / STOP_FILE, (json.dumps({"owner": facts["owner"], "time": time.time()}) + "\n").encode())
    except OSError as error:
        raise QloraError(
            f"the stop file cannot be written ({error.strerror})",
            place=str(run_dir / STOP_FILE),
            next_step="ask the owner of the job, or send its ranks SIGTERM",
        ) from error
    return facts


def wait_for_end(run_dir: Path, timeout: float) -> dict[str, Any]:
    """Wait until nobody holds the run directory. Returns what `read_status` says then.

    Raises:
        QloraError: the time is over.
    """
    end = time.monotonic() + timeout
    while (facts := read_status(run_dir))["owner_alive"]:
        if time.monotonic() >= end:
            raise QloraError(
                f"still running after {timeout:g} s",
                place=str(run_dir),
                found=f"step {facts['step']}",
                next_step="it has been asked, and stops after its step; look again with `qlora status`",
            )
        time.sleep(POLL_SECONDS)
    return facts
