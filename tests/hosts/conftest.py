"""The tests on two hosts, which take minutes, run when they are asked for: `make test-hosts`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ASKED = os.environ.get("QLORA_TEST_HOSTS") == "1"
ON_HOSTS = "test_two_hosts.py"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == ON_HOSTS and not ASKED else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips all of a file from one place, so that the summary has one line for them."""
    if reason := getattr(getattr(item, "module", None), "WHY_NOT", None):
        pytest.skip(f"no two hosts on this machine: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ASKED:
        terminalreporter.write_line(f"not run: tests/hosts/{ON_HOSTS}, on two hosts of its own: make test-hosts")
