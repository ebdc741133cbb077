"""`qlora merge`: adapter into base, as a model folder of its own."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.adapter_folder import require_adapter
from qlora.cli.failures import DebugOption
from qlora.cli.out_folder import require_empty
from qlora.config.paths import exists, missing_hint
from qlora.errors import ConfigError, DataError

BUILTIN_TEXT = "builtin"
_UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))} | {
    unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), start=1)
}


class Onto(str, Enum):
    """Which weights the update is added to."""

    dequantized = "dequantized"
    original = "original"
    quantized = "quantized"


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
        Onto,
        typer.Option(
            help="dequantized: the quantized base that was trained, as 16 bit. original: the weights before. "
            "quantized: the sum, quantized again."
        ),
    ] = Onto.dequantized,
    dtype: Annotated[
        Dtype | None, typer.Option(help="dtype of the result; by default the base's.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model instead of the one the adapter records.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most one file holds.")] = "5GB",
    report: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=f"Compare the result with base and adapter on a file of text or rows, or on the word `{BUILTIN_TEXT}`; "
            "both are loaded whole.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help=f"Compare every form that can be made, not only the one that is written; on `{BUILTIN_TEXT}` where "
            "there is no --report.",
        ),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Write base and adapter as one model that needs neither; print its folder.

    A report goes to OUT/merge_report.json and is printed.
    """
    require_adapter(adapter)
    require_empty(out)
    shard_bytes = parse_size(max_shard_size)
    if measure and report is None:
        report = BUILTIN_TEXT
    if report is not None and report != BUILTIN_TEXT and not exists(Path(report).expanduser()):
        raise DataError("no such file", place="--report", found=report, next_step=missing_hint(report))
    from qlora.adapter.merge_files import run_merge

    folder = run_merge(
        adapter,
        out,
        onto=onto.value,
        dtype=dtype.value if dtype is not None else None,
        base=base,
        shard_bytes=shard_bytes,
        report=report,
        measure_all=measure,
    )
    if report is not None:
        from qlora.adapter.merge_report import REPORT_NAME

        print_report(json.loads((folder / REPORT_NAME).read_text(encoding="utf-8")))
    typer.echo(str(folder))


def parse_size(text: str) -> int:
    """Return `5GB`, `500 MB` or `2GiB` as bytes. Raises ConfigError, also where there is no unit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or int(float(found[1]) * unit) < 1:
        raise ConfigError("not a size", place="--max-shard-size", found=text, wanted="a number and a unit: 5GB, 500MB, 2GiB")
    return int(float(found[1]) * unit)


def print_report(report: dict[str, Any]) -> None:
    """Print the differences as a table, the form that was written first."""
    typer.echo(
        f"beside base and adapter in {report['unmerged_dtype']}, on {report['num_tokens']:,} tokens of {report['text']}:"
    )
    typer.echo(
        f"{'form':<12}  {'dtype':<8}  {'mean KL':>9}  {'logits':>8}  {'same token':>10}  {'loss':>7}  {'unmerged':>8}"
    )
    for form, own in report["forms"].items():
        typer.echo(
            f"{form:<12}  {own['dtype']:<8}  {own['mean_kl']:>9.3g}  {own['largest_logit_difference']:>8.3g}  "
            f"{own['same_token']:>10.1%}  {own['loss']:>7.4f}  {own['loss_unmerged']:>8.4f}"
        )
    typer.echo("mean KL and loss in nats a token, over all tokens; logits: the largest difference")
    for form, reason in report["left_out"].items():
        typer.echo(f"{form} is left out: {reason}")
