"""Jobs in each of which something happens at a place of its own: one launch of two ranks does them all."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class End:
    """How a job of a script `jobs_with_*.py` ended.

    Attributes:
        codes, logs: of each rank.
        seconds: from when it happened to the end of the last rank; infinite where nothing happened.
    """

    run_dir: Path
    codes: list[int]
    seconds: float
    logs: list[str]

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    @property
    def checkpoints(self) -> list[str]:
        return sorted(file.parent.name for file in self.run_dir.glob("checkpoints/*/COMMITTED"))


def run_places(
    project: Any, folder: Path, config: str, script: str, places: dict[str, list[str]], always: Sequence[str] = ()
) -> dict[str, End]:
    """Do a job for each place.

    Args:
        script: in this folder.
        places: what each job overrides; `{folder}` and `{eval}` in it are filled in.
        always: what all override.
    """
    jobs: list[dict[str, Any]] = []
    for number, (place, overrides) in enumerate(places.items()):
        run_dir, log = folder / f"run{number}", folder / f"log{number}"
        more = [text.format(folder=folder, eval=project.eval) for text in overrides]
        argv = ["train", str(project.job), f"train.output_dir={run_dir}", *always, *more]
        jobs.append({"argv": argv, "port": free_port(), "log": str(log), "run_dir": str(run_dir), "place": place})
    launch(project, folder, config, script, jobs)
    return {job["place"]: end_of(job) for job in jobs}


def launch(project: Any, folder: Path, config: str, script: str, jobs: list[dict[str, Any]]) -> None:
    """Let two ranks do the jobs of a table, by a script of this folder."""
    table, log = folder / "jobs.json", folder / "launch.log"
    table.write_text(json.dumps(jobs))
    path = str(Path(__file__).with_name(script))
    launcher = project.start([*project.launch_arguments(config, 2), path, str(table)], log)
    assert project.wait(launcher, log) == 0, log.read_text()[-4000:]


def end_of(job: dict[str, Any]) -> End:
    """What the ranks have left of a job."""
    codes, times = zip(*(json.loads(Path(f"{job['log']}.{rank}.end").read_text()) for rank in (0, 1)), strict=True)
    logs = [Path(f"{job['log']}.{rank}").read_text(errors="replace") for rank in (0, 1)]
    happened = Path(f"{job['log']}.happened")
    seconds = max(times) - float(happened.read_text()) if happened.exists() else math.inf
    return End(Path(job["run_dir"]), list(codes), seconds, logs)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
