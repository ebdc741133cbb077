"""`qlora train`: the main job."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora.cli.failures import DebugOption
from qlora.cli.job import ConfigArgument, OverridesArgument, read_job
from qlora.cli.loading import modules_that_stay


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after one real step at full length on every rank; keep nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Override a refusal; it says what is given up.")] = False,
    debug: DebugOption = False,
) -> None:
    """Train an adapter as a job file says.

    Values of overrides are YAML: data.train=[a.jsonl,b.jsonl], model.quantization=null. Relative paths start at the
    working directory. On several processes:

    accelerate launch --config_file launch/accelerate/zero2.yaml -m qlora train CONFIG
    """
    job = read_job(config, overrides, "train")
    with modules_that_stay():
        from qlora.train.setup import run_training

    code = run_training(job, dry_run=dry_run, force=force)
    if code:
        raise typer.Exit(code)
