"""A job of two ranks on two hosts: it trains as on one, and outlives a cut cable and a power failure."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NUM_STEPS, SAVED_EVERY = 60, 10
SILENT_SECONDS = 10  # longer than a busy machine keeps a thread from running
# What the two sides may take from the fault to their end: the silence, and what is done about it.
BOUND_SECONDS = SILENT_SECONDS + 45
START_SECONDS = 300.0


def load(name: str, path: Path) -> ModuleType:
    """A module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


machines = load("qlora_test_two_hosts", Path(__file__).with_name("hosts.py"))
WHY_NOT = machines.why_not()
pytestmark = pytest.mark.hosts


class Launch:
    """One launcher, on one host."""

    def __init__(self, host: Any, words: Sequence[str], log: Path) -> None:
        self.host, self.log = host, log
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE"))}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": machines.DEVICE}
        with log.open("ab") as file:
            file.write(b"--- started\n")
            file.flush()
            command = host.command(sys.executable, "-m", "accelerate.commands.launch", *words)
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the launcher on {self.host.name} does not end in {seconds:g} s:\n{self.said()[-4000:]}")

    def said(self) -> str:
        """Since it was started."""
        return self.log.read_text(errors="replace").rpartition("--- started\n")[2]


class Lab:
    """Two hosts that see one file system, with a small base, data and a job file in it."""

    def __init__(self, folder: Path) -> None:
        project = load("qlora_test_project", ROOT / "tests/e2e/conftest.py").Project(folder)
        self.folder, self.job = folder, project.job
        self.hosts = machines.TwoHosts(folder)

    def train(self, run: str, *more: str) -> list[str]:
        words = ["-m", "qlora", "train", str(self.job), f"train.output_dir={self.folder / run}"]
        words += [f"train.max_steps={NUM_STEPS}", "train.per_device_train_batch_size=2"]
        words += [f"checkpoint.every_steps={SAVED_EVERY}", f"train.silent_rank_seconds={SILENT_SECONDS}"]
        return [*words, *more]

    def start(self, run: str, *more: str) -> list[Launch]:
        """A launcher on each host, as a batch script starts them."""
        launches = []
        for rank, host in enumerate(self.hosts):
            where = ["--machine_rank", str(rank), "--main_process_ip", self.hosts.north.name, "--main_process_port", "29400"]
            words = ["--config_file", "launch/accelerate/zero3.yaml", "--num_machines", "2", "--num_processes", "2", *where]
            words += ["--deepspeed_multinode_launcher", "standard", "--num_cpu_threads_per_process", "1"]
            launches.append(Launch(host, [*words, *self.train(run, *more)], self.folder / f"{run}.{host.name}.log"))
        return launches

    def finish(self, run: str, *more: str) -> None:
        """Start it on both hosts and see it to its end."""
        launches = self.start(run, *more)
        for launch in launches:
            assert launch.wait(START_SECONDS) == 0, launch.said()[-4000:]
        assert self.status(run)["state"] == "done"

    def until_saved(self, run: str, step: int, launches: Sequence[Launch]) -> None:
        """Wait until a checkpoint is there and the run is past it. The launchers may not end before."""
        end = time.monotonic() + START_SECONDS
        saved = self.folder / run / f"checkpoints/step-{step:08d}/COMMITTED"
        while not (saved.exists() and self.last_step(run) > step + 1):
            for launch in launches:
                assert launch.process.poll() is None, launch.said()[-4000:]
            assert time.monotonic() < end, launches[0].said()[-4000:]
            time.sleep(0.02)

    def rows(self, run: str) -> dict[int, dict[str, Any]]:
        """The training rows, the last of each step."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}

    def last_step(self, run: str) -> int:
        return max(self.rows(run), default=0)

    def status(self, run: str) -> dict[str, Any]:
        """What `qlora status` says."""
        words = [sys.executable, "-m", "qlora", "status", str(self.folder / run), "--json"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    def adapter(self, run: str) -> bytes:
        return (self.folder / run / "adapter/adapter_model.safetensors").read_bytes()

    def check_same(self, run: str, whole: str) -> None:
        """All that was trained and said, to the last bit."""
        found, wanted = self.rows(run), self.rows(whole)
        assert sorted(found) == sorted(wanted) == list(range(1, NUM_STEPS + 1))
        for key in ("loss", "grad_norm"):
            assert [found[step][key] for step in sorted(found)] == [wanted[step][key] for step in sorted(wanted)]
        assert self.adapter(run) == self.adapter(whole)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("hosts"))
    try:
        lab.hosts.start()
        yield lab
    finally:
        lab.hosts.stop()


@pytest.fixture(scope="module")
def whole(lab: Lab) -> str:
    """The run that nothing happened to."""
    lab.finish("whole")
    return "whole"


@pytest.fixture(autouse=True)
def _nothing_is_left_running(lab: Lab) -> Iterator[None]:
    """Each test leaves two hosts that are up and do nothing; what a failed one leaves goes with its host."""
    yield
    if any(host.first == 0 or host.processes() for host in lab.hosts):
        lab.hosts.stop()
        lab.hosts.start()


def check_ended(lab: Lab, launches: Sequence[Launch], since: float) -> None:
    """Every launcher that is left has ended with an error, in a bounded time, and nothing of it runs on."""
    for launch in launches:
        assert launch.wait(max(1.0, since + BOUND_SECONDS - time.monotonic())) != 0
        assert launch.host.processes() == []


def test_two_hosts_train_what_one_trains(lab: Lab, whole: str) -> None:
    words = ["--config_file", "launch/accelerate/zero3.yaml", "--num_processes", "2", "--main_process_port", "0"]
    alone = Launch(lab.hosts.north, [*words, *lab.train("alone")], lab.folder / "alone.log")
    assert alone.wait(START_SECONDS) == 0, alone.said()[-4000:]
    lab.check_same("alone", whole)
    assert "processes 2, zero3" in (lab.folder / "whole.north.log").read_text()


def test_a_cable_that_is_pulled_for_a_moment(lab: Lab, whole: str) -> None:
    """The run waits, and goes on by itself."""
    launches = lab.start("flapped", "train.silent_rank_seconds=60")
    lab.until_saved("flapped", SAVED_EVERY, launches)
    lab.hosts.cut()
    time.sleep(1.0)
    step = lab.last_step("flapped")
    time.sleep(2.0)
    assert lab.last_step("flapped") == step < NUM_STEPS  # it was needed
    lab.hosts.mend()
    for launch in launches:
        assert launch.wait(START_SECONDS) == 0, launch.said()[-4000:]
    lab.check_same("flapped", whole)


def test_a_cut_cable(lab: Lab, whole: str) -> None:
    launches = lab.start("cut")
    lab.until_saved("cut", 2 * SAVED_EVERY, launches)
    lab.hosts.cut()
    since = time.monotonic()
    try:
        check_ended(lab, launches, since)
    finally:
        lab.hosts.mend()
    north, south = (launch.said() for launch in launches)
    check_names(north, rank=1, host="south")
    check_names(south, rank=0, host="north")
    check_failed(lab, "cut", names="south")
    lab.finish("cut")
    lab.check_same("cut", whole)


def test_the_power_of_the_other_host_fails(lab: Lab, whole: str) -> None:
    launches = lab.start("south off")
    lab.until_saved("south off", 2 * SAVED_EVERY, launches)
    lab.hosts.south.switch_off()
    check_ended(lab, launches[:1], time.monotonic())
    check_names(launches[0].said(), rank=1, host="south")
    check_failed(lab, "south off", names="south")
    lab.hosts.switch_on_again(lab.hosts.south)
    lab.finish("south off")
    lab.check_same("south off", whole)


def test_the_power_of_the_first_host_fails(lab: Lab, whole: str) -> None:
    """Nobody is left to write down how the run ended; its files and its lock say enough."""
    launches = lab.start("north off")
    lab.until_saved("north off", 2 * SAVED_EVERY, launches)
    lab.hosts.north.switch_off()
    check_ended(lab, launches[1:], time.monotonic())
    check_names(launches[1].said(), rank=0, host="north")
    status = lab.status("north off")
    assert (status["state"], status["recorded_state"], status["owner_alive"]) == ("failed", "running", False)
    assert status["resumable"] is True
    lab.hosts.switch_on_again(lab.hosts.north)
    lab.finish("north off")
    lab.check_same("north off", whole)


def check_names(said: str, *, rank: int, host: str) -> None:
    """An error with what belongs to it names the other side."""
    errors = re.findall(r"^error(?: \(rank \d+\))?: .*(?:\n  .*)*", said, re.MULTILINE)
    assert any(f"rank {rank}" in error and host in error for error in errors), said[-4000:]


def check_failed(lab: Lab, run: str, *, names: str) -> None:
    status = lab.status(run)
    assert (status["state"], status["recorded_state"], status["exit_code"]) == ("failed", "failed", 1)
    assert status["resumable"] is True
    assert "rank 1" in status["reason"]
    assert names in status["reason"]
