"""Base and adapter found and loaded by all ranks alike: what one rank cannot read, or has otherwise, ends all of them."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from qlora.adapter.config_file import CONFIG_NAME
from qlora.adapter.files import TEMPLATE_NAME, WEIGHTS_NAME, AdapterFile, load_adapter, open_adapter
from qlora.adapter.keys import BASE
from qlora.adapter.residual import INITIAL_NAME
from qlora.distributed.runtime import Runtime


def find_adapter(runtime: Runtime, folder: Path) -> AdapterFile:
    """Check an adapter's files. Collective.

    Raises:
        AdapterError: see `open_adapter`; the same on every rank.
        LaunchError: ranks have other files.
    """
    found = runtime.together(partial(open_adapter, folder))
    if runtime.world_size > 1:
        runtime.refuse_differences({"adapter": runtime.together(partial(_digest, folder))})
    return found


def _digest(folder: Path) -> str:
    """A hash (sha256, hexadecimal) of an adapter's files. Rank-local."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME, TEMPLATE_NAME, INITIAL_NAME):
        file = folder / name
        if file.is_file():
            digest.update(f"{name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def put_in(runtime: Runtime, model: Any, found: AdapterFile) -> None:
    """Load an adapter into a base. Collective. Raises AdapterError: see `load_adapter`; the same on every rank."""
    if any(key.part == BASE for key in found.entries):
        # It is compared with the base's own weight, for which ranks that keep shares meet: they all find the same.
        load_adapter(model, found.folder)
    else:
        runtime.together(partial(load_adapter, model, found.folder))
