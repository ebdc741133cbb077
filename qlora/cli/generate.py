"""`qlora generate`: ask the base, with or without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.adapter_folder import require_adapter
from qlora.cli.failures import DebugOption


def generate(
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the user says.", show_default=False)],
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Adapter or checkpoint folder; without it the base alone.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model in place of the one the adapter records; without either, builtin:tiny.", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    debug: DebugOption = False,
) -> None:
    """Print what the model answers to a prompt."""
    if adapter is not None:
        require_adapter(adapter)
    from qlora.infer.generate import run_generate

    answer = run_generate(adapter, prompt, base=base, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    typer.echo(answer)
