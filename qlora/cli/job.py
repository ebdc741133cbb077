"""The job file on the command line, for every verb that takes one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qlora.config.rules import Verb
    from qlora.config.schema import JobConfig

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The job file (YAML).", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Laid over the job file: train.max_steps=10", show_default=False),
]


def read_job(config: Path, overrides: list[str] | None, verb: Verb) -> JobConfig:
    """Load a job file with what is laid over it. Raises ConfigError, also for what this verb cannot do with it."""
    from qlora.config.load import load_config
    from qlora.config.rules import check_job

    job = load_config(config, overrides or [])
    check_job(job, verb, str(config))
    return job
