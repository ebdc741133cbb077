"""The tests on a real SLURM run when they are asked for: `make test-slurm`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ASKED = os.environ.get("QLORA_TEST_SLURM") == "1"
ON_A_CLUSTER = "test_cluster.py"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == ON_A_CLUSTER and not ASKED else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips all of a file from one place, so that the summary has one line for them."""
    if reason := getattr(getattr(item, "module", None), "WHY_NOT", None):
        pytest.skip(f"no SLURM on this machine: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ASKED:
        terminalreporter.write_line(f"not run: tests/slurm/{ON_A_CLUSTER}, which starts a SLURM of its own: make test-slurm")
