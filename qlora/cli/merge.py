"""`qlora merge`: adapter into base, as a model folder of its own."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.adapter_folder import require_adapter
from qlora.cli.failures import DebugOption
from qlora.cli.out_folder import require_empty


class Onto(str, Enum):
    """Which weights the update is added to."""

    dequantized = "dequantized"
    original = "original"


class Dtype(str, Enum):
    """dtype of the merged weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter or checkpoint folder.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist or be empty.", show_default=False)
    ],
    onto: Annotated[
        Onto, typer.Option(help="dequantized: the 4-bit base that was trained, as 16 bit. original: the weights before.")
    ] = Onto.dequantized,
    dtype: Annotated[
        Dtype | None, typer.Option(help="dtype of the result; by default the base's.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model instead of the one the adapter records.", show_default=False)
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write base and adapter as one model that needs neither; print its folder."""
    require_adapter(adapter)
    require_empty(out)
    from qlora.adapter.merge_files import run_merge

    typer.echo(str(run_merge(adapter, out, onto=onto.value, dtype=dtype.value if dtype is not None else None, base=base)))
