"""The launch files of the project, and the environment that `accelerate launch` gives the ranks of each.

The launcher itself is run once for each file, in a fork of a process that has imported it already, with a script that
writes down what it finds. A start of the chaos run then needs no launcher: it changes the numbers of rank and world.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DUMP = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
RANK_KEYS = ("RANK", "LOCAL_RANK", "ROLE_RANK")
WORLD_KEYS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """A launch file and a number of ranks."""

    config: str
    num_ranks: int

    def __str__(self) -> str:
        return f"{self.config} x{self.num_ranks}"


class Launches:
    """Environments by launch file, each asked for once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, str]] = {}

    def environment(self, world: World, rank: int, port: int) -> dict[str, str]:
        """What rank `rank` of a world finds in os.environ."""
        if world.config not in self._known:
            self._known[world.config] = _ask_launcher(world.config, self._folder)
        found = dict(self._known[world.config])
        if world.config == "single":
            return found
        found |= {key: str(rank) for key in RANK_KEYS if key in found}
        found |= {key: str(world.num_ranks) for key in WORLD_KEYS if key in found}
        # The launcher's own store is gone with the launcher: rank 0 opens one.
        return found | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _ask_launcher(config: str, folder: Path) -> dict[str, str]:
    """Run `accelerate launch` with a launch file and one or two ranks of a script that dumps its environment."""
    script, out, log = folder / "dump.py", folder / f"{config}.environment.json", folder / f"{config}.launch.log"
    script.write_text(DUMP)
    num_ranks = "1" if config == "single" else "2"
    options = ["--config_file", f"launch/accelerate/{config}.yaml", "--num_processes", num_ranks]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.chdir(ROOT)
            from accelerate.commands.launch import launch_command, launch_command_parser

            sys.argv = ["accelerate-launch"]
            launch_command(launch_command_parser().parse_args([*options, "--main_process_port", "0", str(script), str(out)]))
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or not out.exists():
        raise RuntimeError(f"the launcher of {config} ended with {code}:\n{log.read_text()[-3000:]}")
    found: dict[str, str] = json.loads(out.read_text())
    return found


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
