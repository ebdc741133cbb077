"""A run directory with checkpoints of a few small files, written by the project's own writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qlora.checkpoint import state
from qlora.checkpoint.save import write_checkpoint
from qlora.checkpoint.state import Identity, TrainerState
from qlora.config.schema import JobConfig

Write = Callable[..., Path]


@pytest.fixture
def identity() -> Identity:
    config: dict[str, Any] = JobConfig().model_dump(mode="json")
    return Identity({"name": "b", "revision": None, "fingerprint": "f"}, "data", "plan", config, 2, "ddp", {"torch": "2"}, 2)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def write(run_dir: Path, identity: Identity) -> Write:
    """write(step, keep_last=2): a checkpoint whose files are its own."""

    def do(step: int, keep_last: int = 2) -> Path:
        files = {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": bytes([step]) * 300,
            state.OPTIMIZER_NAME: bytes([step + 1]) * 200,
            state.STATE_NAME: json.dumps(asdict(TrainerState(step, 4 * step, 100 * step, 10 * step))).encode(),
        }
        folder = run_dir / state.FOLDER / state.folder_name(step)
        write_checkpoint(folder, files, identity, keep_last)
        return folder

    return do
