"""`qlora export`: an adapter for a server that reads a narrower format."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.adapter_folder import require_adapter
from qlora.cli.failures import DebugOption
from qlora.cli.out_folder import require_empty


class Reader(str, Enum):
    """Who is to read it."""

    vllm = "vllm"
    sglang = "sglang"
    peft = "peft"


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter or checkpoint folder.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist or be empty.", show_default=False)
    ],
    reader: Annotated[
        Reader,
        typer.Option(
            "--for",
            help="vllm or sglang (the same files): one r and one lora_alpha, A and B alone. peft: an adapter that started "
            "from the base's weights as one for the base itself; any other is copied.",
            show_default=False,
        ),
    ],
    report: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Measure what is lost on a file of text or rows, or on the word `builtin`, where an adapter started from "
            "the weights of a quantized base; the base is loaded twice, whole.",
            show_default=False,
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write an adapter that computes the same for another reader; print its folder.

    What the reader does not apply (DoRA, lora_bias, modules trained as wholes, rows of tokens, fused experts) is refused.
    """
    require_adapter(adapter)
    require_empty(out)
    from qlora.adapter.export import run_export

    exported = run_export(adapter, out, reader.value, report=report)
    if exported.approximate:
        typer.echo(
            "note: this adapter started from the weights of a quantized base. Beside that base, quantized as it is, the "
            "plain adapter is near the trained one and not equal to it.",
            err=True,
        )
    if exported.remaining is not None:
        typer.echo(str(exported.remaining), err=True)
    if reader is Reader.vllm:
        typer.echo(f"note: serve it with --max-lora-rank {exported.r} or more", err=True)
    typer.echo(str(exported.folder))
