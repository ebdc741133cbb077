"""The batch script of a job: what is asked of SLURM, and how ranks are started, stopped and started again.

One launcher runs on each node, started by one `srun`, so that `SLURM_NODEID` is the node's own. The batch shell, which
runs on the first node, gets the signal before the time is up (or when the job is pre-empted), asks the ranks to save and
stop, through a file first and by a signal second, waits for them, and puts the job back into the queue where the run
directory says that it can go on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from qlora.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED")
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below the ports that Linux hands out to clients
_MAX_IDLE_RUNS = 5  # in a row, that end without a new checkpoint


@dataclass(frozen=True)
class Container:
    """An image that has bash, this package and accelerate on its PATH.

    Args:
        runtime: pyxis is srun's own option, over enroot; apptainer runs inside the task.
        image: what the runtime takes: a file, or an address it can fetch.
        mounts: host folder, or `host:container`; the working directory is always mounted.
    """

    runtime: Literal["pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One training run: what is laid over the job file, and the run directory that comes of it."""

    overrides: tuple[str, ...]
    run_dir: str


@dataclass(frozen=True)
class SlurmJob:
    """Everything a batch script says.

    Args:
        name: of the job, and of its log files.
        nodes, gpus_per_node, ranks_per_node: 0 GPUs is a job over gloo on CPUs; it needs `ranks_per_node`, which is
            otherwise the number of GPUs.
        launch: accelerate's configuration, relative to `workdir`.
        config: the job file; None makes a script that takes it, and what is laid over it, as arguments.
        tasks: one, or an array job of several. None where `config` is None.
        workdir: where the job runs; None is where it is submitted.
        environment: folder of a virtual environment; None takes what is on the PATH.
        stop_seconds: how long before its end the job is asked to save and stop. SLURM may do so a minute earlier.
        logs: folder of the log files, relative to `workdir`.
        options: further options of sbatch, as on its command line.

    Raises:
        ConfigError: values that contradict each other, or that sbatch would take for something else.
    """

    name: str
    nodes: int
    gpus_per_node: int
    launch: str
    config: str | None = None
    tasks: tuple[Task, ...] = ()
    ranks_per_node: int | None = None
    workdir: str | None = None
    environment: str | None = ".venv"
    container: Container | None = None
    cpus_per_rank: int = 4
    time: str = "24:00:00"
    stop_seconds: int = 300
    logs: str = "."
    array_limit: int | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError("cannot name a job", place="--name", found=self.name, wanted="letters, digits and . _ -")
        if not _TIME.fullmatch(self.time):
            raise ConfigError("not a time", place="--time", found=self.time, wanted="MINUTES, HH:MM:SS or D-HH:MM:SS")
        if not self.gpus_per_node and not self.ranks_per_node:
            raise ConfigError(
                "a node without GPUs does not say how many ranks it runs",
                place="--gpus-per-node",
                found=0,
                next_step="--ranks-per-node 1",
            )
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ConfigError(
                "more ranks than GPUs",
                place="--ranks-per-node",
                found=f"{self.ranks} ranks on {self.gpus_per_node} GPUs",
                wanted="a GPU a rank",
            )
        if "%" in self.logs:
            raise ConfigError("SLURM replaces what follows a %", place="--logs", found=self.logs)
        for option in self.options:
            if not option.startswith("-"):
                raise ConfigError("not an option of sbatch", place="--sbatch", found=option, wanted="--sbatch=--mem=0")
        words = [self.launch, self.config, self.workdir, self.environment, self.logs, *self.options]
        words += [word for task in self.tasks for word in (*task.overrides, task.run_dir)]
        words += [self.container.image, *self.container.mounts] if self.container else []
        for word in words:
            if word is not None and any(not c.isprintable() for c in word):
                raise ConfigError("a batch script cannot hold a control character", found=repr(word))
        folders = [task.run_dir for task in self.tasks]
        if len(set(folders)) < len(folders):
            raise ConfigError(
                "two tasks would train in one folder",
                place="train.output_dir",
                found=next(folder for folder in folders if folders.count(folder) > 1),
            )

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1


def render(job: SlurmJob) -> str:
    """Return the batch script of a job: bash, with its options for sbatch on top."""
    parts = [_head(job), _place(job), _what_to_run(job), _START, _STOP, _SRUN, _END]
    return "\n\n".join(_fill(part.strip("\n"), job) for part in parts) + "\n"


def log_files(job: SlurmJob, job_id: str) -> tuple[str, str]:
    """Return the names of a submitted job's log and of its nodes' logs; what is not known yet is a *."""
    number = f"{job_id}_*" if job.is_array else job_id
    stem = PurePath(job.logs, f"slurm-{job.name}-{number}")
    return f"{stem}.log", f"{stem}-*.log"


def _head(job: SlurmJob) -> str:
    if job.config is None:
        said = [
            "# Runs any job file. Submit from the repository root:",
            f"#   sbatch launch/slurm/{job.name}.sbatch configs/llama-3.1-8b_chat.yaml [key=value ...]",
            "# Options given to sbatch win over those below: sbatch --nodes 4 --time 12:00:00 ...",
            "# Environment: LAUNCH_CONFIG (accelerate's configuration), RANKS (of a node; default: its GPUs), VENV (.venv).",
            "# `qlora slurm CONFIG --nodes N --gpus-per-node G` makes a script for one job, with containers and arrays.",
        ]
    else:
        said = [f"# Made by `qlora slurm` for {job.config}."]
    said.append("# The job is asked to save and stop before its time is up, and goes back into the queue then.")
    number = "%A_%a" if job.is_array else "%j"
    log = str(PurePath(job.logs, f"slurm-%x-{number}.log"))
    options = [f"--job-name={job.name if job.config is not None else 'qlora'}", f"--nodes={job.nodes}"]
    options.append("--ntasks-per-node=1")
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    options += [f"--cpus-per-task={job.ranks * job.cpus_per_rank}", f"--time={job.time}"]
    options += [f"--signal=B:USR1@{job.stop_seconds}", "--requeue", "--open-mode=append", f"--output={_sbatch_word(log)}"]
    if job.is_array:
        limit = f"%{job.array_limit}" if job.array_limit else ""
        options.append(f"--array=0-{len(job.tasks) - 1}{limit}")
    own = {option.partition("=")[0] for option in job.options}
    options = [option for option in options if option.partition("=")[0] not in own]
    options += [_sbatch_option(option) for option in job.options]
    return "\n".join(["#!/usr/bin/env bash", *said, *(f"#SBATCH {option}" for option in options), "set -euo pipefail"])


def _sbatch_option(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}={_sbatch_word(value)}" if equals else option


def _sbatch_word(word: str) -> str:
    """Quote for a line that sbatch reads, not bash: it takes quotes off, and a # begins a comment there."""
    if re.search(r"[\s#'\\]", word) and '"' not in word:
        return f'"{word}"'
    return word


def _place(job: SlurmJob) -> str:
    lines = ["# The launcher configurations name files relative to the working directory."]
    lines.append(
        'cd -- "${SLURM_SUBMIT_DIR:?submit with sbatch}"' if job.workdir is None else f"cd -- {shlex.quote(job.workdir)}"
    )
    if job.container is None and (job.environment is not None or job.config is None):
        folder = '"${VENV:-$PWD/.venv}"' if job.config is None else shlex.quote(str(job.environment))
        lines.append(f"export PATH={folder}/bin:$PATH")
    if job.container is None:
        lines.append('command -v accelerate >/dev/null || { echo "no accelerate on the PATH: $PATH" >&2; exit 2; }')
    return "\n".join(lines)


def _what_to_run(job: SlurmJob) -> str:
    lines: list[str] = []
    if job.config is None:
        lines += [
            '[ $# -ge 1 ] || { echo "usage: sbatch SCRIPT CONFIG [key=value ...]" >&2; exit 2; }',
            'train=("$@")',
            "# Also the place where a mistake in the job file is found first.",
            "run_dir=$(python -c '",
            "import sys",
            "from qlora.config.load import load_config",
            "print(load_config(sys.argv[1], sys.argv[2:]).train.output_dir)",
            '\' "$@")',
            f"launch=${{LAUNCH_CONFIG:-{job.launch}}}",
            "ranks_per_node=${RANKS:-${SLURM_GPUS_ON_NODE:-1}}",
        ]
    else:
        if job.is_array:
            lines.append('case "${SLURM_ARRAY_TASK_ID:?submit as an array}" in')
            for index, task in enumerate(job.tasks):
                lines += [f"  {index})", *(f"    {line}" for line in _task_lines(job.config, task)), "    ;;"]
            lines += ['  *) echo "no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac"]
        else:
            lines += _task_lines(job.config, job.tasks[0])
        lines += [f"launch={shlex.quote(job.launch)}", f"ranks_per_node={job.ranks}"]
    lines += [*_container_lines(job)]
    stem = "slurm-$SLURM_JOB_NAME-" + ("${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.is_array else "$SLURM_JOB_ID")
    folder = "" if PurePath(job.logs) == PurePath(".") else f"{shlex.quote(str(PurePath(job.logs)))}/"
    lines.append(f'node_logs={folder}"{stem}-%N.log"')
    return "\n".join(lines)


def _task_lines(config: str, task: Task) -> list[str]:
    words = " ".join(shlex.quote(word) for word in (config, *task.overrides))
    return [f"train=({words})", f"run_dir={shlex.quote(task.run_dir)}"]


def _container_lines(job: SlurmJob) -> Iterator[str]:
    """What makes a command run in the container."""
    if job.container is None:
        return
    yield 'mounts="$PWD:$PWD"'
    yield from (f"mounts+={shlex.quote(f',{mount}')}" for mount in job.container.mounts)
    image = shlex.quote(job.container.image)
    if job.container.runtime == "apptainer":
        nv = "--nv " if job.gpus_per_node else ""
        yield f'in_container=(apptainer exec {nv}--pwd "$PWD" --bind "$mounts" {image})'
    else:
        yield f'in_container=(--container-image={image} --container-mounts="$mounts" --container-workdir="$PWD")'


def _fill(text: str, job: SlurmJob) -> str:
    """Put what stands before a command into a part of the script: in the ranks' step, and for one beside it."""
    of_srun = before = beside = ""
    if job.container is not None:
        if job.container.runtime == "pyxis":
            of_srun = '"${in_container[@]}" '
            beside = 'srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 "${in_container[@]}" '
        else:
            before = beside = '"${in_container[@]}" '
    return (
        text.replace("@OF_SRUN@", of_srun)
        .replace("@BEFORE@", before)
        .replace("@BESIDE@", beside)
        .replace("@IDLE_RUNS@", str(_MAX_IDLE_RUNS))
    )


_START = f"""
# After a requeue the job goes on from its own newest checkpoint, whatever it was first told to start from.
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then train+=(checkpoint.resume=auto); fi

# An array and one of its tasks have the same number: this task alone is meant where SLURM is told or asked something.
this=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_}}${{SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}}
nodes=$SLURM_JOB_NUM_NODES
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Jobs of one user may share a node: a port of the job's own.
port=$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))
threads=$((SLURM_CPUS_PER_TASK > ranks_per_node ? SLURM_CPUS_PER_TASK / ranks_per_node : 1))
"""

_STOP = """
asked=
# The batch shell alone gets the signal. The file reaches the ranks wherever they run; the signal is for those that
# cannot see it. A file system that lags delays the one, not the other.
# shellcheck disable=SC2317,SC2329
ask_to_stop() {
  [ -z "$asked" ] || return 0
  asked=$1
  echo "got $asked: asking the ranks to save and stop"
  @BESIDE@qlora stop "$run_dir" || true
  # SLURM sends a TERM to the ranks itself, and a second signal would end them at once.
  if [ "$asked" = USR1 ]; then scancel --signal=USR1 "$this.0" || true; fi
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM
"""

_SRUN = """
# Runs on every node: SLURM_NODEID is the node's own. The ranks take USR1 over; the launcher, which it would kill, must
# not have it.
# shellcheck disable=SC2016
on_node='
  trap "" USR1
  exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"
'
# A launcher told to end itself gives its ranks time to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# A node that fails ends the others, which would wait for it.
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
  --kill-on-bad-exit=1 --open-mode=append --output="$node_logs" @OF_SRUN@\\
  @BEFORE@bash -c "$on_node" launcher \\
  --config_file "$launch" --num_machines "$nodes" --num_processes "$((nodes * ranks_per_node))" \\
  --main_process_ip "${hosts%%$'\\n'*}" --main_process_port "$port" --deepspeed_multinode_launcher standard \\
  --num_cpu_threads_per_process "$threads" \\
  -m qlora train "${train[@]}" &
launcher=$!
"""

_END = """
# A trapped signal interrupts `wait`; the end of srun is what counts.
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do
  code=0
  wait "$launcher" || code=$?
done
# It may have ended while the trap was at work; 127: it was waited for.
ended=0
if [ "$code" -gt 128 ]; then wait "$launcher" || ended=$?; fi
if [ "$code" -gt 128 ] && [ "$ended" != 127 ]; then code=$ended; fi
requeues=${node_logs/%-%N.log/.requeues}
if [ "$code" = 0 ]; then rm -f "$requeues"; exit 0; fi

# Launchers turn every code but 0 into 1: the run directory says how it really ended; nothing, where it was not come to yet.
facts=$(@BESIDE@qlora status "$run_dir" --json) || facts=
again=
case $facts in *'"resumable": true'* | *'"state": "stopped"'* | '') again=1 ;; esac
# Cancelled after it was asked to stop: SLURM sends the same signal at the limit, and only its own words tell them apart.
case $(scontrol show job --oneliner "$this" || true) in
  *JobState=CANCELLED* | *'JobState=COMPLETING Reason=None '*'PreemptTime=None '*) again= ;;
esac
# A run too short to come to a new checkpoint must not start for ever.
newest=none former='' count=0
if [[ $facts =~ checkpoints/step-([0-9]+) ]]; then newest=${BASH_REMATCH[1]}; fi
if [ -e "$requeues" ]; then read -r former count <"$requeues"; fi
if [ "$former" = "$newest" ]; then count=$((count + 1)); else count=1; fi
if [ "$asked" = USR1 ] && [ -n "$again" ] && [ "$count" -le @IDLE_RUNS@ ]; then
  echo "asked to stop, and not done: requeueing job $this"
  echo "$newest $count" >"$requeues"
  trap '' USR1 TERM
  scontrol requeue "$this"
else
  echo "ended with code $code; what the ranks said: ${node_logs/\\%N/*}" >&2
fi
exit "$code"
"""
