"""Jobs on a real SLURM of two nodes, submitted by `qlora slurm`: train, are stopped, come back, end as if never stopped."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NUM_STEPS = 40
WORDS = ["json", "dumps", "list", "dict", "os", "path", "open", "read", "write"]
# Tiny tensors: compiling them, or a second thread, costs several times what it gives.
QUICK = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
JOB = f"""\
lora: {{r: 4, lora_alpha: 8}}
data: {{train: [rows.jsonl], max_length: 128, cache_dir: cache}}
train: {{max_steps: {NUM_STEPS}, output_dir: runs/none}}
checkpoint: {{every_steps: 15}}
"""


def load_cluster() -> ModuleType:
    """The module beside this file: tests are no package."""
    spec = importlib.util.spec_from_file_location("qlora_test_cluster", Path(__file__).with_name("cluster.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


clusters = load_cluster()
WHY_NOT = clusters.why_not()
pytestmark = pytest.mark.slurm


class Place:
    """A folder that jobs are submitted from, and the cluster they go to."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        (folder / "launch").symlink_to(ROOT / "launch")
        (folder / "job.yaml").write_text(JOB)
        chance = random.Random(0)
        rows = [
            {"prompt": f"What is {i}?", "completion": " ".join(chance.choices(WORDS, k=10 + i % 30))} for i in range(200)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def qlora(self, *words: str) -> str:
        """Run the command on the controller, in the folder."""
        inside = ["sh", "-c", 'cd "$1"; shift; exec "$@"', "sh", str(self.folder), sys.executable, "-m", "qlora", *words]
        return str(self.cluster.run("nice", "-n", "5", *inside, **QUICK))

    def sbatch(self, *words: str, **more: str) -> str:
        """Submit as it is, from the folder, and return the job's number."""
        inside = ["sh", "-c", 'cd "$1"; shift; exec "$@"', "sh", str(self.folder), "sbatch", "--parsable", *words]
        return str(self.cluster.run(*inside, **QUICK, **more)).strip()

    def submit(self, run_dir: str, *words: str, time_limit: str = "20", stop_seconds: int = 60) -> str:
        """Submit a job of two nodes with a rank each, and return its number."""
        options = ["--nodes", "2", "--ranks-per-node", "1", "--cpus-per-rank", "1", "--logs", "the logs"]
        options += ["--time", time_limit, "--stop-seconds", str(stop_seconds), "--submit"]
        said = self.qlora("slurm", "job.yaml", f"train.output_dir={run_dir}", *words, *options)
        found = re.search(r"job (\d+),", said)
        assert found is not None, said
        return found[1]

    def steps(self, run_dir: str) -> list[int]:
        path = self.folder / run_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row["step"] for row in rows if "loss" in row]

    def until_step(self, run_dir: str, step: int) -> None:
        clusters.wait_for(lambda: step in self.steps(run_dir), 180)

    def status(self, run_dir: str) -> dict[str, Any]:
        path = self.folder / run_dir / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def adapter(self, run_dir: str) -> bytes:
        return (self.folder / run_dir / "adapter/adapter_model.safetensors").read_bytes()

    def logs(self) -> str:
        return "\n".join(f"{path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.folder / "the logs").iterdir()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    cluster = clusters.Cluster(2)
    try:
        yield Place(cluster.start(), tmp_path_factory.mktemp("slurm") / "a folder")
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def whole(place: Place) -> bytes:
    """The adapter of a run that nobody stopped."""
    facts = place.cluster.wait(place.submit("runs/the whole"))
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), place.logs()
    assert place.status("runs/the whole")["state"] == "done"
    return place.adapter("runs/the whole")


def check_resumed(place: Place, run_dir: str, job: str, whole: bytes) -> None:
    """The job was stopped once, came back, and made what the uninterrupted one made."""
    facts = place.cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), place.logs()
    log = next((place.folder / "the logs").glob(f"slurm-*-{job}.log")).read_text()
    assert f"requeueing job {job}" in log
    steps = place.steps(run_dir)
    assert steps == list(range(1, NUM_STEPS + 1))  # each once: it went on from the step at which it stopped
    nodes = [path.read_text() for path in sorted((place.folder / "the logs").glob(f"slurm-*-{job}-node*.log"))]
    assert len(nodes) == 2
    assert "stopped on request" in nodes[0]
    assert "resuming" in nodes[0]
    assert (
        not re.search(r"^(error|Traceback)", nodes[0] + nodes[1], re.MULTILINE) or "ChildFailedError" in nodes[0] + nodes[1]
    )
    assert place.adapter(run_dir) == whole


def test_two_ranks_on_two_nodes(place: Place, whole: bytes) -> None:
    logs = sorted((place.folder / "the logs").glob("slurm-the-whole-*-node*.log"))
    assert [path.stem.rpartition("-")[2] for path in logs] == ["node1", "node2"]
    assert "processes 2, zero2" in logs[0].read_text()
    assert len(whole) > 1000


def test_the_signal_before_the_end(place: Place, whole: bytes) -> None:
    """What `--signal=B:USR1@60` sends, sent now."""
    job = place.submit("runs/signalled")
    place.until_step("runs/signalled", 5)
    place.cluster.run("scancel", "--batch", "--signal=USR1", job)
    check_resumed(place, "runs/signalled", job, whole)


def test_preempted_by_a_job_of_higher_priority(place: Place, whole: bytes) -> None:
    job = place.submit("runs/preempted")
    place.until_step("runs/preempted", 5)
    urgent = place.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    assert place.cluster.wait(urgent)["JobState"] == "COMPLETED"
    check_resumed(place, "runs/preempted", job, whole)


def test_a_time_limit_shorter_than_the_job(place: Place) -> None:
    """SLURM's own signal, whose time is not exact: a run gets at most a minute, the job needs more."""
    job = place.submit("runs/short", "train.max_steps=5000", time_limit="1", stop_seconds=20)
    log = place.folder / f"the logs/slurm-short-{job}-node1.log"
    clusters.wait_for(lambda: log.exists() and "resuming" in log.read_text(), 300)
    resumed = len(place.steps("runs/short"))
    place.until_step("runs/short", resumed + 3)
    assert int(place.cluster.facts(job)["Restarts"]) >= 1
    steps = place.steps("runs/short")
    assert steps == list(range(1, len(steps) + 1))
    place.cluster.run("scancel", job)
    place.cluster.wait(job)


def test_a_node_goes_down(place: Place, whole: bytes) -> None:
    """SLURM ends and requeues the job by itself."""
    job = place.submit("runs/downed")
    place.until_step("runs/downed", 17)
    place.cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    clusters.wait_for(lambda: place.cluster.facts(job)["Restarts"] == "1", 60)
    place.cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)
    facts = place.cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), place.logs()
    # Where SLURM leaves the ranks the time they save first; otherwise they go back to the checkpoint after step 15.
    assert set(place.steps("runs/downed")) == set(range(1, NUM_STEPS + 1))
    assert "resuming" in next((place.folder / "the logs").glob(f"slurm-*-{job}-node1.log")).read_text()
    assert place.adapter("runs/downed") == whole


@pytest.mark.parametrize("name", ["single_node", "multi_node"])
def test_shipped_scripts(place: Place, name: str) -> None:
    """With what sbatch's command line says instead of their own numbers. The GPUs are SLURM's idea alone."""
    options = ["--gpus-per-node=1", "--cpus-per-task=1", "--time=30", f"--nodes={2 if name == 'multi_node' else 1}"]
    script = str(ROOT / f"launch/slurm/{name}.sbatch")
    overrides = [f"train.output_dir=runs/{name}", "train.max_steps=2"]
    job = place.sbatch(*options, script, "job.yaml", *overrides, VENV=sys.prefix)
    assert place.cluster.wait(job)["JobState"] == "COMPLETED", (place.folder / f"slurm-qlora-{job}.log").read_text()
    said = (place.folder / f"slurm-qlora-{job}-node1.log").read_text()
    assert ("processes 2, zero3" if name == "multi_node" else "processes 1") in said
    assert place.status(f"runs/{name}")["state"] == "done"


def test_cancelled_saves_and_stays_away(place: Place) -> None:
    job = place.submit("runs/cancelled")
    place.until_step("runs/cancelled", 5)
    place.cluster.run("scancel", job)
    assert place.cluster.wait(job)["JobState"] == "CANCELLED"
    clusters.wait_for(lambda: place.status("runs/cancelled").get("state") == "stopped", 30)
    status = place.status("runs/cancelled")
    assert (status["resumable"], status["exit_code"]) == (True, 75)
    assert (place.folder / f"runs/cancelled/checkpoints/step-{status['step']:08d}/COMMITTED").is_file()
    time.sleep(1)
    assert place.cluster.facts(job)["JobState"] == "CANCELLED"


def test_cancelled_after_it_was_asked_to_stop(place: Place) -> None:
    """As in the last minutes of a run, in which it was to come back."""
    job = place.submit("runs/asked, cancelled")
    place.until_step("runs/asked, cancelled", 5)
    place.cluster.run("scancel", "--batch", "--signal=USR1", job)
    log = next((place.folder / "the logs").glob(f"slurm-*-{job}.log"))
    clusters.wait_for(lambda: "got USR1" in log.read_text(), 30)
    place.cluster.run("scancel", job)
    clusters.wait_for(lambda: "ended with code" in log.read_text() or "requeueing" in log.read_text(), 60)
    assert place.cluster.wait(job)["JobState"] == "CANCELLED", log.read_text()
    assert place.cluster.facts(job)["Restarts"] == "0"
    assert place.status("runs/asked, cancelled")["resumable"] is True


def test_stopped_by_hand_stays_stopped(place: Place) -> None:
    job = place.submit("runs/by hand")
    place.until_step("runs/by hand", 5)
    place.qlora("stop", "runs/by hand")
    facts = place.cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert place.status("runs/by hand")["state"] == "stopped"


def test_an_array_of_two_tasks(place: Place) -> None:
    """Each task has its own folder, port and log; `--array-limit 1` lets one wait for the other."""
    tasks = ["--launch", "ddp", "--task", "train.seed=1", "--task", "train.seed=2 lora.r=2", "--array-limit", "1"]
    job = place.submit("runs/array", "train.max_steps=2", *tasks)
    for index in range(2):
        assert place.cluster.wait(f"{job}_{index}")["JobState"] == "COMPLETED", place.logs()
        assert place.status(f"runs/array/{index}")["state"] == "done"
        assert (place.folder / f"the logs/slurm-array-{job}_{index}-node2.log").is_file()
    assert len(place.adapter("runs/array/1")) < len(place.adapter("runs/array/0"))


def test_a_task_of_an_array_comes_back_alone(place: Place) -> None:
    """Also the one whose number is the whole array's."""
    options = ["--nodes", "1", "--ranks-per-node", "1", "--cpus-per-rank", "1", "--logs", "the logs", "--time", "20"]
    tasks = ["--task", "train.seed=1", "--task", "train.seed=2"]
    said = place.qlora("slurm", "job.yaml", "train.output_dir=runs/two", *tasks, *options, "--submit")
    found = re.search(r"job (\d+),", said)
    assert found is not None, said
    job = found[1]
    for index in range(2):
        place.until_step(f"runs/two/{index}", 5)
    stopped = next(index for index in range(2) if place.cluster.facts(f"{job}_{index}")["JobId"] == job)
    place.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_{stopped}")
    for index in range(2):
        facts = place.cluster.wait(f"{job}_{index}")
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", str(int(index == stopped))), place.logs()
        assert place.steps(f"runs/two/{index}") == list(range(1, NUM_STEPS + 1))


def test_a_mistake_ends_the_job_with_its_words(place: Place) -> None:
    job = place.submit("runs/wrong", "data.train=[nothing.jsonl]")
    facts = place.cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert "nothing.jsonl" in (place.folder / f"the logs/slurm-wrong-{job}-node1.log").read_text()
