"""What a batch script says, and what it does with a SLURM that is made of shell scripts."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.errors import ConfigError
from qlora.slurm.examples import EXAMPLES, FOLDER
from qlora.slurm.job import Container, SlurmJob, Task, log_files, render

ROOT = Path(__file__).parents[2]
HARD = "a 'b\" $(touch /tmp/no) `c` \\ %N"
TWO_NODES = SlurmJob(
    name="mine",
    nodes=2,
    gpus_per_node=0,
    ranks_per_node=2,
    cpus_per_rank=3,
    launch="launch/accelerate/zero2.yaml",
    config="job.yaml",
    tasks=(Task(("train.max_steps=3",), "runs/mine"),),
    workdir="/my dir",
    environment=None,
)
KINDS = {
    "plain": TWO_NODES,
    "gpus": replace(TWO_NODES, gpus_per_node=8, ranks_per_node=None, environment="/an env"),
    "array": replace(TWO_NODES, tasks=(Task(("a.b=1",), "runs/0"), Task(("a.b=2", "c=x y"), "runs/1")), array_limit=1),
    "pyxis": replace(TWO_NODES, container=Container("pyxis", "me/image:1", ("/data", "/a b:/c"))),
    "apptainer": replace(TWO_NODES, gpus_per_node=2, container=Container("apptainer", "/my images/q.sif", ("/data",))),
    "generic": replace(TWO_NODES, gpus_per_node=8, ranks_per_node=None, config=None, tasks=(), workdir=None),
    "hard": replace(TWO_NODES, config=HARD, tasks=(Task((f"x={HARD}",), HARD),), workdir=HARD, environment=HARD),
}


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("job", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_script_is_bash(job: SlurmJob, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(render(job))
    subprocess.run(["bash", "-n", str(path)], check=True)
    checker = shutil.which("shellcheck")
    if checker and job is not KINDS["hard"]:  # whose words look like mistakes
        done = subprocess.run([checker, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_scripts_are_what_is_rendered(name: str) -> None:
    assert (ROOT / FOLDER / f"{name}.sbatch").read_text() == render(EXAMPLES[name])
    assert {path.stem for path in (ROOT / FOLDER).glob("*.sbatch")} == set(EXAMPLES)
    assert (ROOT / EXAMPLES[name].launch).is_file()


def test_what_is_asked_of_slurm() -> None:
    found = options(render(TWO_NODES))
    assert found == {
        "--job-name": "mine",
        "--nodes": "2",
        "--ntasks-per-node": "1",
        "--cpus-per-task": "6",
        "--time": "24:00:00",
        "--signal": "B:USR1@300",
        "--requeue": "",
        "--open-mode": "append",
        "--output": "slurm-%x-%j.log",
    }
    assert options(render(KINDS["gpus"]))["--gpus-per-node"] == "8"
    array = options(render(KINDS["array"]))
    assert (array["--array"], array["--output"]) == ("0-1%1", "slurm-%x-%A_%a.log")
    more = replace(TWO_NODES, options=("--dependency=singleton", "--comment=for me", "--exclusive"), logs="my logs")
    assert render(replace(KINDS["gpus"], options=("--gpus-per-node=h100:8",))).count("#SBATCH --gpus-per-node=") == 1
    found = options(render(more))
    assert (found["--dependency"], found["--comment"], found["--exclusive"]) == ("singleton", '"for me"', "")
    assert found["--output"] == '"my logs/slurm-%x-%j.log"'
    assert log_files(more, "7") == ("my logs/slurm-mine-7.log", "my logs/slurm-mine-7-*.log")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks_per_node": None}, "how many ranks"),
        ({"gpus_per_node": 1, "ranks_per_node": 2}, "more ranks than GPUs"),
        ({"name": "a b"}, "cannot name a job"),
        ({"time": "a day"}, "not a time"),
        ({"logs": "a%b"}, "replaces what follows"),
        ({"options": ("exclusive",)}, "not an option"),
        ({"workdir": "/a\nscancel -u me"}, "control character"),
        ({"tasks": (Task((), "runs/a"), Task((), "runs/a"))}, "one folder"),
    ],
)
def test_refused(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(TWO_NODES, **change)


FAKES = {
    "python": f'exec {shlex.quote(sys.executable)} "$@"',
    "scontrol": (
        'case "$1 $2" in "show hostnames") printf "head\\nother\\n" ;; "show job") cat "$STATE/job" ;; '
        '*) echo "scontrol $*" >>"$SAID" ;; esac'
    ),
    "scancel": 'echo "scancel $*" >>"$SAID"; : >"$STATE/stop"',
    # Runs what it is told to on one node, as the second of two.
    "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 exec "$@"',
    "accelerate": (
        'printf "%s\\n" "$@" >"$STATE/arguments"; trap >"$STATE/traps"; '
        'while [ ! -e "$STATE/stop" ]; do sleep .05; done; exit "$(cat "$STATE/code")"'
    ),
    "qlora": (
        'echo "qlora $*" >>"$SAID"; if [ "$1" = status ]; then cat "$STATE/facts"; fi; '
        # The launcher ends while the script still asks it to.
        'if [ "$1" = stop ] && [ -n "${SLOW:-}" ]; then : >"$STATE/stop"; sleep 1; fi'
    ),
}
# What `scontrol show job --oneliner` says at the end of a script (22.05).
RUNNING = "JobId=20007 JobName=mine JobState=RUNNING Reason=None Dependency=(null) PreemptTime=None SuspendTime=None\n"
COMPLETING = RUNNING.replace("RUNNING", "COMPLETING")


class FakeSlurm:
    """The programs of a cluster as shell scripts, which write down what they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = folder / "said"
        # Without what the scripts take from it.
        outside = {k: v for k, v in os.environ.items() if k not in ("VENV", "RANKS", "LAUNCH_CONFIG")}
        self.environment = outside | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SAID": str(self.said),
            "STATE": str(folder),
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NAME": "mine",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "x[1-2]",
            "SLURM_CPUS_PER_TASK": "6",
            "SLURM_SUBMIT_DIR": str(folder),
        }
        (folder / "bin").mkdir()
        for name, text in FAKES.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)

    def run(
        self,
        job: SlurmJob,
        *,
        code: int,
        facts: str = "",
        send: signal.Signals | None = None,
        known: str = RUNNING,
        **more: str,
    ) -> int:
        """The script's exit code; `send` is what its shell gets when the launcher runs, which then ends with `code`."""
        (self.folder / "code").write_text(str(code))
        (self.folder / "facts").write_text(facts)
        (self.folder / "job").write_text(known)  # to SLURM
        (self.folder / "script").write_text(render(job))
        if send is None:
            (self.folder / "stop").touch()
        elif (self.folder / "stop").exists():
            (self.folder / "stop").unlink()
        process = subprocess.Popen(
            ["bash", str(self.folder / "script")], env=self.environment | more, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 30
        while not (self.folder / "arguments").exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        if send is not None:
            time.sleep(0.2)
            process.send_signal(send)
            if send == signal.SIGTERM:  # SLURM's own, to the ranks
                time.sleep(0.5)
                (self.folder / "stop").touch()
        return process.wait(timeout=30)

    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().splitlines()

    def orders(self) -> list[str]:
        return self.said.read_text().splitlines() if self.said.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    folder = tmp_path / "a folder"
    folder.mkdir()
    return FakeSlurm(folder)


def here(job: SlurmJob, slurm: FakeSlurm) -> SlurmJob:
    return replace(job, workdir=str(slurm.folder))


def test_what_a_node_runs(slurm: FakeSlurm) -> None:
    assert slurm.run(here(TWO_NODES, slurm), code=0) == 0
    words = slurm.arguments()
    given = dict(zip(words[1:-3:2], words[2:-3:2], strict=True))
    assert given == {
        "--machine_rank": "1",
        "--config_file": "launch/accelerate/zero2.yaml",
        "--num_machines": "2",
        "--num_processes": "4",
        "--main_process_ip": "head",
        "--main_process_port": "10007",
        "--deepspeed_multinode_launcher": "standard",
        "--num_cpu_threads_per_process": "3",
        "-m": "qlora",
    }
    assert words[-3:] == ["train", "job.yaml", "train.max_steps=3"]
    assert "SIGUSR1" in (slurm.folder / "traps").read_text()  # ignored since before it began
    assert slurm.orders() == []


def test_words_reach_training_as_they_are(slurm: FakeSlurm) -> None:
    job = here(replace(KINDS["hard"], environment=None), slurm)
    assert slurm.run(job, code=1, facts="{}") == 1
    assert slurm.arguments()[-2:] == [HARD, f"x={HARD}"]
    assert slurm.orders() == [f"qlora status {HARD} --json"]


def test_a_job_asked_to_stop_goes_back_into_the_queue(slurm: FakeSlurm) -> None:
    facts = '{\n  "state": "stopped",\n  "resumable": true\n}'
    assert slurm.run(here(TWO_NODES, slurm), code=1, facts=facts, send=signal.SIGUSR1) == 1
    assert slurm.orders() == [
        "qlora stop runs/mine",
        "scancel --signal=USR1 20007.0",
        "qlora status runs/mine --json",
        "scontrol requeue 20007",
    ]


def facts_at(step: int | None) -> str:
    checkpoint = "null" if step is None else f'{{"step": {step}, "path": "runs/mine/checkpoints/step-{step:08d}"}}'
    return f'{{"state": "stopped", "resumable": {"false" if step is None else "true"}, "last_checkpoint": {checkpoint}}}'


@pytest.mark.parametrize("facts", ["", facts_at(None), facts_at(7)], ids=["nothing", "no checkpoint", "the same checkpoint"])
def test_runs_that_come_to_nothing_are_not_requeued_for_ever(slurm: FakeSlurm, facts: str) -> None:
    def is_requeued(facts: str) -> bool:
        (slurm.folder / "arguments").unlink(missing_ok=True)
        slurm.run(here(TWO_NODES, slurm), code=1, facts=facts, send=signal.SIGUSR1)
        return slurm.orders()[-1] == "scontrol requeue 20007"

    requeues = slurm.folder / "slurm-mine-20007.requeues"
    assert is_requeued(facts)
    former = requeues.read_text().split()
    requeues.write_text(f"{former[0]} 4\n")
    assert is_requeued(facts)
    assert not is_requeued(facts)
    assert is_requeued(facts_at(8))
    assert requeues.read_text() == "00000008 1\n"
    assert slurm.run(here(TWO_NODES, slurm), code=0) == 0
    assert not requeues.exists()


@pytest.mark.parametrize("number", [None, signal.SIGTERM], ids=["failed", "cancelled"])
def test_what_nobody_wants_again_is_not_requeued(slurm: FakeSlurm, number: signal.Signals | None) -> None:
    facts = '{\n  "state": "failed",\n  "resumable": true\n}'
    assert slurm.run(here(TWO_NODES, slurm), code=1, facts=facts, send=number) == 1
    assert not [order for order in slurm.orders() if order.startswith("scontrol")]


@pytest.mark.parametrize(
    ("known", "again"),
    [
        (COMPLETING, False),  # scancel
        (RUNNING.replace("RUNNING", "CANCELLED"), False),
        (COMPLETING.replace("Reason=None", "Reason=TimeLimit"), True),
        (COMPLETING.replace("PreemptTime=None", "PreemptTime=2026-01-02T03:04:05"), True),
        ("", True),  # SLURM does not answer
    ],
    ids=["cancelled", "cancelled, in other words", "time limit", "pre-empted", "unknown"],
)
def test_cancelled_after_it_was_asked_to_stop(slurm: FakeSlurm, known: str, again: bool) -> None:
    facts = '{\n  "state": "stopped",\n  "resumable": true\n}'
    assert slurm.run(here(TWO_NODES, slurm), code=1, facts=facts, send=signal.SIGUSR1, known=known) == 1
    assert ("scontrol requeue 20007" in slurm.orders()) == again


def test_a_job_that_finishes_although_it_was_asked_is_done(slurm: FakeSlurm) -> None:
    assert slurm.run(here(TWO_NODES, slurm), code=0, send=signal.SIGUSR1) == 0
    assert "scontrol requeue 20007" not in slurm.orders()


@pytest.mark.parametrize("code", [0, 1, 137])
def test_how_a_job_ended_is_known_although_it_ended_while_it_was_asked(slurm: FakeSlurm, code: int) -> None:
    facts = '{"state": "failed"}'
    assert slurm.run(here(TWO_NODES, slurm), code=code, facts=facts, send=signal.SIGUSR1, SLOW="1") == code


def test_a_restarted_job_resumes_from_its_own_checkpoint(slurm: FakeSlurm) -> None:
    slurm.run(here(TWO_NODES, slurm), code=0, SLURM_RESTART_COUNT="2")
    assert slurm.arguments()[-1] == "checkpoint.resume=auto"


def test_a_task_of_an_array(slurm: FakeSlurm) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "20006", "SLURM_ARRAY_TASK_ID": "1"}
    facts = '{\n  "resumable": true\n}'
    slurm.run(here(KINDS["array"], slurm), code=1, facts=facts, send=signal.SIGUSR1, **task)
    assert slurm.arguments()[-3:] == ["job.yaml", "a.b=2", "c=x y"]
    # Not by the job's number, which may be the whole array's.
    said = ["qlora stop runs/1", "scancel --signal=USR1 20006_1.0", "qlora status runs/1 --json", "scontrol requeue 20006_1"]
    assert slurm.orders() == said
    assert slurm.run(here(KINDS["array"], slurm), code=0, **(task | {"SLURM_ARRAY_TASK_ID": "2"})) == 2


def test_a_script_for_any_job_reads_the_run_directory(slurm: FakeSlurm) -> None:
    (slurm.folder / "job.yaml").write_text("train: {output_dir: runs/of this}\n")
    facts = '{\n  "resumable": true\n}'
    (slurm.folder / "job").write_text(render(EXAMPLES["multi_node"]))
    done = subprocess.run(["bash", str(slurm.folder / "job")], env=slurm.environment, capture_output=True, check=False)
    assert (done.returncode, b"usage" in done.stderr) == (2, True)
    (slurm.folder / "code").write_text("1")
    (slurm.folder / "facts").write_text(facts)
    (slurm.folder / "stop").touch()
    done = subprocess.run(
        ["bash", str(slurm.folder / "job"), "job.yaml", "train.max_steps=3"],
        env=slurm.environment | {"SLURM_GPUS_ON_NODE": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert slurm.orders() == ["qlora status runs/of this --json"]
    words = slurm.arguments()
    assert words[words.index("--num_processes") + 1] == "8"
    assert words[-3:] == ["train", "job.yaml", "train.max_steps=3"]


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_containers(kind: str) -> None:
    script = render(KINDS[kind])
    if kind == "pyxis":
        assert 'in_container=(--container-image=me/image:1 --container-mounts="$mounts" --container-workdir=' in script
        assert "mounts=\"$PWD:$PWD\"\nmounts+=,/data\nmounts+=',/a b:/c'\n" in script
        assert '--output="$node_logs" "${in_container[@]}" \\\n  bash -c' in script
        assert 'srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 "${in_container[@]}" qlora stop "$run_dir"' in script
    else:
        assert "in_container=(apptainer exec --nv --pwd" in script
        assert '  "${in_container[@]}" bash -c "$on_node" launcher' in script
        assert '\n  "${in_container[@]}" qlora stop "$run_dir"' in script
    assert "export PATH" not in script
