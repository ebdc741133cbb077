"""`qlora slurm`: a batch script for a job, and its submission."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora.cli.failures import DebugOption
from qlora.cli.job import ConfigArgument, OverridesArgument, read_job
from qlora.config.paths import missing_hint
from qlora.errors import ConfigError

if TYPE_CHECKING:
    from qlora.slurm.job import SlurmJob, Task

_LAUNCH_FOLDER = Path("launch/accelerate")


def slurm(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option("--gpus-per-node", min=0, help="GPUs of a node, each a rank; 0 is CPUs.", show_default=False),
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ranks-per-node", min=1, help="Ranks of a node without GPUs.", show_default=False)
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            help="ddp, zero1, zero2, zero3, ... or a file of Accelerate's; zero2 (one rank: single) if not given.",
            show_default=False,
        ),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch; otherwise it is printed.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the script to a file.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the job; the output folder's where not given.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="An array job: a task for each --task 'KEY=VALUE ...', in OUTPUT_DIR/0, 1, ...",
            show_default=False,
        ),
    ] = None,
    array_limit: Annotated[
        int | None, typer.Option("--array-limit", min=1, help="Tasks that run at once.", show_default=False)
    ] = None,
    time: Annotated[str, typer.Option("--time", help="Limit of one run; the job goes on after it.")] = "24:00:00",
    stop_seconds: Annotated[
        int, typer.Option("--stop-seconds", min=1, max=65535, help="Save and stop so long before the limit.")
    ] = 300,
    cpus_per_rank: Annotated[int, typer.Option("--cpus-per-rank", min=1, help="CPUs of a rank.")] = 4,
    partition: Annotated[str | None, typer.Option("--partition", show_default=False)] = None,
    account: Annotated[str | None, typer.Option("--account", show_default=False)] = None,
    qos: Annotated[str | None, typer.Option("--qos", show_default=False)] = None,
    mem: Annotated[str | None, typer.Option("--mem", help="Memory of a node; 0 is all.", show_default=False)] = None,
    dependency: Annotated[
        str | None,
        typer.Option(
            "--dependency", help="As sbatch's; singleton waits for the user's jobs of the same name.", show_default=False
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", help="One more option of sbatch: --sbatch=--constraint=h100.", show_default=False),
    ] = None,
    container: Annotated[
        str | None, typer.Option("--container", help="An image with this package installed.", show_default=False)
    ] = None,
    container_runtime: Annotated[
        Literal["pyxis", "apptainer"], typer.Option("--container-runtime", help="pyxis is srun's, over enroot.")
    ] = "pyxis",
    mount: Annotated[
        list[str] | None, typer.Option("--mount", help="A folder the container sees, or HOST:THERE.", show_default=False)
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option("--venv", help="Virtual environment on the nodes; this one where not given.", show_default=False),
    ] = None,
    logs: Annotated[str, typer.Option("--logs", help="Folder of the log files.")] = ".",
    debug: DebugOption = False,
) -> None:
    """Make a SLURM batch script for a job, and submit it.

    One launcher a node, a rank a GPU. Before its time is up, or when it is pre-empted, the job saves, stops and goes
    back into the queue; it then goes on from its last checkpoint. The working directory and the environment must be
    the same folders on every node.
    """
    overrides = overrides or []
    run_dir = Path(read_job(config, overrides, "slurm").train.output_dir)
    if gpus_per_node is None:
        if ranks_per_node is None:
            raise ConfigError("how many GPUs has a node?", place="--gpus-per-node", next_step="--gpus-per-node 8, or 0")
        gpus_per_node = 0
    if array_limit is not None and not task:
        raise ConfigError("there is one task", place="--array-limit", next_step="--task 'KEY=VALUE ...' for each task")
    from qlora.slurm.job import Container, SlurmJob, render

    tasks = _tasks(config, overrides, task or [])
    if name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.name).strip(".-_") or "qlora"
    num_ranks = nodes * (ranks_per_node or gpus_per_node)
    named = (("partition", partition), ("account", account), ("qos", qos), ("mem", mem), ("dependency", dependency))
    job = SlurmJob(
        name=name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        launch=_launch_file(launch or ("zero2" if num_ranks > 1 else "single"), num_ranks),
        config=str(config),
        tasks=tasks,
        workdir=str(Path.cwd()),
        environment=str(Path(environment).absolute()) if environment is not None else _this_environment(),
        container=None if container is None else Container(container_runtime, container, tuple(mount or ())),
        cpus_per_rank=cpus_per_rank,
        time=time,
        stop_seconds=stop_seconds,
        logs=logs,
        array_limit=array_limit,
        options=(*(f"--{key}={value}" for key, value in named if value is not None), *(sbatch or [])),
    )
    script = render(job)
    if out is not None:
        try:
            out.write_text(script)
        except OSError as error:
            raise ConfigError(f"cannot be written ({error.strerror})", place=f"--out: {out}") from error
    if submit:
        _submit(job, script, logs)
    elif out is None:
        typer.echo(script, nl=False)
    else:
        typer.echo(f"wrote {out}; submit it with: sbatch {shlex.quote(str(out))}")


def _submit(job: SlurmJob, script: str, logs: str) -> None:
    from qlora.cli.rows import print_rows
    from qlora.slurm.job import log_files
    from qlora.slurm.submit import submit

    number = submit(script, logs=Path(logs))
    log, node_logs = log_files(job, number)
    folders = [shlex.quote(task.run_dir) for task in job.tasks]
    print_rows(
        [
            ("submitted", f"job {number}, {job.name}, {job.nodes} node{'s' * (job.nodes > 1)}, ranks a node: {job.ranks}"),
            ("log", log),
            ("of a node", node_logs),
            ("how it stands", f"qlora status {folders[0]}" + (", ..." if job.is_array else "")),
            ("save and stop", f"scancel --batch --signal=USR1 {number} (and requeue), qlora stop {folders[0]} (for good)"),
        ]
    )


def _tasks(config: Path, overrides: list[str], tasks: list[str]) -> tuple[Task, ...]:
    """The runs of a job, each checked as a job of its own. Raises ConfigError."""
    from qlora.slurm.job import Task

    if not tasks:
        return (Task(tuple(overrides), read_job(config, overrides, "slurm").train.output_dir),)
    found = []
    for index, text in enumerate(tasks):
        try:
            own = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"cannot be split into words ({error})", place="--task", found=text) from error
        words = [*overrides, *own]
        folder = read_job(config, words, "slurm").train.output_dir
        if not any(word.startswith("train.output_dir=") for word in own):
            folder = str(Path(folder, str(index)))
            words.append(f"train.output_dir={folder}")
            folder = read_job(config, words, "slurm").train.output_dir
        found.append(Task(tuple(words), folder))
    return tuple(found)


def _launch_file(name: str, num_ranks: int) -> str:
    """The launch configuration of a name or a path. Raises ConfigError where it, or what it names, is not there."""
    import yaml

    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else _LAUNCH_FOLDER / f"{name}.yaml"
    if not path.is_file():
        here = sorted(file.stem for file in _LAUNCH_FOLDER.glob("*.yaml"))
        raise ConfigError(
            "no such launch configuration",
            place=f"--launch: {path}",
            wanted=", ".join(here) or None,
            next_step=missing_hint(path) if here else "run this from the repository root, or name a file: --launch PATH",
        )
    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("cannot be read", place=f"--launch: {path}", found=str(error)) from error
    value = value if isinstance(value, dict) else {}
    named = (value.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if named is not None and not Path(named).is_file():
        raise ConfigError(
            "names a DeepSpeed file that is not there",
            place=f"--launch: {path}",
            found=named,
            next_step="run this from the folder that the file's name starts at",
        )
    if value.get("distributed_type") in ("NO", False) and num_ranks > 1:
        raise ConfigError(
            "starts one process", place=f"--launch: {path}", found=f"{num_ranks} ranks", wanted="ddp, zero2, ..."
        )
    return str(path)


def _this_environment() -> str | None:
    """The virtual environment that this command runs in."""
    return sys.prefix if sys.prefix != sys.base_prefix else None
