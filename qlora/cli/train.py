"""`qlora train`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.failures import DebugOption


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The job file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Laid over the job file: train.max_steps=10", show_default=False),
    ] = None,
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
    from qlora.config.load import load_config
    from qlora.config.rules import check_job

    job = load_config(config, overrides or [])
    check_job(job, "train", str(config))
    from qlora.train.setup import run_training

    code = run_training(job, dry_run=dry_run, force=force)
    if code:
        raise typer.Exit(code)
