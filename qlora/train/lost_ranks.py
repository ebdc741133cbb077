"""A job of which one rank is lost: it ends on the others too, and says whose fault it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from qlora.config.schema import JobConfig
from qlora.distributed.peers import Peers
from qlora.errors import QloraError
from qlora.files import write_file
from qlora.train.ending import last_saved_step
from qlora.train.preempt import End, StopFlag

# Torch's own end of a collective names nobody, and must not come first.
MARGIN_SECONDS = 300.0


def collective_timeout(config: JobConfig) -> timedelta:
    """How long a collective may take before torch gives it up."""
    return timedelta(seconds=config.train.stalled_rank_seconds + config.train.silent_rank_seconds + MARGIN_SECONDS)


@contextmanager
def watched(config: JobConfig, stop: StopFlag) -> Iterator[Peers]:
    """Inside, the ranks of the launch hear of one another, and one that is lost ends all of them.

    Raises:
        RankError: in place of what a collective says when another rank is gone.
    """
    folder = Path(config.train.output_dir)
    peers = Peers(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1,
        silent_seconds=config.train.silent_rank_seconds,
        stalled_seconds=config.train.stalled_rank_seconds,
    )

    def look() -> End | None:
        error = peers.look()
        if error is None:
            return None
        if peers.speaks_for_main():
            stop.on_end = lambda reason, code: record_for_main(folder, peers, reason, code)
        speaks = peers.rank == 0 or peers.speaks_for_main()
        found = f" ({error.found})" if error.found else ""
        # The others' line may be all that their node's log has.
        label = "error:" if peers.rank == 0 else f"error (rank {peers.rank}):"
        text = f"{label} {error if speaks else error.message + found}"
        return End(f"{type(error).__name__}: {error.message}{found}", error.exit_code, text)

    stop.end_when(look)
    peers.start()
    try:
        with peers.explaining():
            yield peers
    except QloraError as error:
        if peers.speaks_for_main():
            error.of_one_rank = True
            record_for_main(folder, peers, f"{type(error).__name__}: {error}", error.exit_code)
        raise
    finally:
        peers.close()


def record_for_main(run_dir: Path, peers: Peers, reason: str, code: int) -> None:
    """Say in status.json how the run ended, in place of a main rank that cannot. For the first of the other ranks.

    Only where the folder is still that rank's: a launcher may have started another one.
    """
    with suppress(OSError, ValueError, AttributeError):
        owner = json.loads((run_dir / "LOCK").read_text(encoding="utf-8", errors="replace"))
        main = {"host": owner["host"], "pid": owner["pid"]}
        if main != peers.process_of(0):
            return
        before = {}
        with suppress(OSError, ValueError):
            before = json.loads((run_dir / "status.json").read_text())
        if any(before.get(key) != value for key, value in main.items()):
            before = {}
        if before.get("state", "running") != "running":
            return
        step = last_saved_step(run_dir)
        status = {"state": "failed", "step": step or 0, "num_steps": None, "num_skipped_steps": 0} | before
        status |= {"state": "failed", "step": step or 0, "exit_code": code, "reason": reason}
        status |= {"resumable": step is not None, **main, "time": time.time()}
        write_file(run_dir / "status.json", (json.dumps(status, indent=2) + "\n").encode())
