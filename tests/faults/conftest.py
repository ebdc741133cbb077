"""One small base, one run without a fault, and what the tests of faults start their jobs with."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.faults.children import EVERY_TWO, NO_MOUNTS, Ended, Jobs, in_child, own_mounts, small_disk


@pytest.fixture(scope="session")
def faults_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The small base, its data and job file, and the ways to launch."""
    project = import_module("tests.e2e.conftest").Project(tmp_path_factory.mktemp("faults"))
    yield project
    project.end_all()


@pytest.fixture(autouse=True, scope="module")
def _without_compiling(without_compiling: None) -> None:
    """In every test here."""


@pytest.fixture(scope="session")
def jobs(faults_project: Any, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    for name in ("qlora.train.setup", "transformers.models.llama.modeling_llama"):
        import_module(name)  # once, and not in every child
    return Jobs(faults_project, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="session")
def whole(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A job of seven steps that meets no fault, with checkpoints after 2, 4, 6 and 7."""
    ended = jobs.train(tmp_path_factory.mktemp("whole") / "run", *EVERY_TWO)
    assert ended.code == 0, ended.log
    return ended


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where a process may not have mounts of its own."""
    log = tmp_path_factory.mktemp("mounts") / "log"

    def work() -> int:
        try:
            own_mounts()
            small_disk(log.parent, 1 << 20)
        except OSError as error:
            print(error)
            return NO_MOUNTS
        return 0

    if in_child(work, log):
        pytest.skip(f"a process may not have mounts of its own here: {log.read_text().strip()}")
