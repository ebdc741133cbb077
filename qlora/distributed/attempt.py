"""Where the ranks of this start of a launch meet.

A launcher that restarts its ranks (`accelerate launch --max_restarts`) keeps its store, and in it the addresses of the
ranks before: the new ones would wait for those (torch 2.13 with accelerate's static rendezvous). So that each start has
keys of its own, the process group's store and the beats' are seen through a prefix with the number of the start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore, register_rendezvous_handler

SCHEME = "qlora"


def is_hosted_by_launcher() -> bool:
    """Whether the launcher keeps the store, and not rank 0 itself."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def address() -> tuple[str, int]:
    """Host and port of the store."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def init_method() -> str | None:
    """What to hand to torch's init_process_group; None is its own way, for launchers that keep no store."""
    if not is_hosted_by_launcher():
        return None
    with suppress(RuntimeError):  # registered before in this process
        register_rendezvous_handler(SCHEME, _rendezvous)
    return f"{SCHEME}://"


def open_store(timeout: timedelta, purpose: str) -> Store:
    """A connection of its own to this start's store, with keys of its own for each purpose. Blocks until it is made.

    Raises:
        RuntimeError: torch's, where nothing answers in time.
    """
    host, port = address()
    if is_hosted_by_launcher():
        store = TCPStore(host, port, is_master=False, timeout=timeout)
    else:
        # As torch does: the process group of the same process shares the server.
        is_main = os.environ.get("RANK") == "0"
        store = TCPStore(host, port, is_master=is_main, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    run, start = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return PrefixStore(f"qlora/{run}/{start}/{purpose}", store)


def _rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Torch's interface: store, rank, number of ranks."""
    yield open_store(timeout, "process group"), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    raise RuntimeError("ranks meet once")
