"""`qlora eval`: the base beside the adapter on data.eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.adapter_folder import require_adapter
from qlora.cli.failures import DebugOption
from qlora.cli.job import ConfigArgument, read_job
from qlora.cli.loading import modules_that_stay


def evaluate(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Laid over the job file: data.eval=[held_out.jsonl]", show_default=False),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Adapter or checkpoint folder; without it the base alone.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    debug: DebugOption = False,
) -> None:
    """Print loss and perplexity on data.eval, base beside adapter.

    Rows are shared out over processes, and so is a base that fits no single GPU:

    accelerate launch --config_file launch/accelerate/zero3.yaml -m qlora eval CONFIG
    """
    job = read_job(config, overrides, "eval")
    if adapter is not None:
        require_adapter(adapter)
    with modules_that_stay():
        from qlora.infer.evaluate import run_evaluate

    run_evaluate(job, adapter, as_json=as_json)
