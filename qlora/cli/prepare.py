"""`qlora prepare`: a base in 4 or 8 bits, as a model folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError

from qlora.cli.failures import DebugOption
from qlora.cli.out_folder import require_empty
from qlora.config.paths import exists, looks_like_path, missing_hint
from qlora.config.rules import unused_keys
from qlora.config.schema import ModelConfig, QuantizationConfig
from qlora.errors import BaseModelError, ConfigError

MODEL, QUANTIZATION = ModelConfig.model_fields, QuantizationConfig.model_fields


def _choices(field: Any) -> str:
    return "|".join(map(str, get_args(field.annotation)))


def prepare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="builtin:tiny, a Hugging Face folder, or a hub id.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist or be empty.", show_default=False)
    ],
    bits: Annotated[
        int, typer.Option(metavar=_choices(QUANTIZATION["bits"]), help="8 is one scale a row; the next three are of 4 bits.")
    ] = QUANTIZATION["bits"].default,
    quant_type: Annotated[
        str, typer.Option(metavar=_choices(QUANTIZATION["quant_type"]), help="The 16 values a weight can have.")
    ] = QUANTIZATION["quant_type"].default,
    block_size: Annotated[
        int, typer.Option(metavar=_choices(QUANTIZATION["block_size"]), help="Weights that share one scale.")
    ] = QUANTIZATION["block_size"].default,
    double_quant: Annotated[bool, typer.Option(help="Quantize the block scales as well.")] = QUANTIZATION[
        "double_quant"
    ].default,
    dtype: Annotated[
        str,
        typer.Option(
            metavar=_choices(MODEL["dtype"]), help="Of what stays unquantized, and of weights before they are quantized."
        ),
    ] = MODEL["dtype"].default,
    skip_module: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Module path suffix that stays unquantized; may be repeated.", show_default=False),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base.", show_default=False)] = None,
    debug: DebugOption = False,
) -> None:
    """Quantize a base once and write it in 4 or 8 bits; print its folder.

    What loads is the same to the bit as the base quantized while it is read, in a quarter or half of the bytes. Adapters
    trained on either load on the other. transformers opens the folder too.
    """
    stated = {
        "bits": bits,
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
        "skip_modules": skip_module or [],
    }
    model = _checked({"base": base, "revision": revision, "dtype": dtype, "quantization": stated})
    unused = unused_keys(model.quantization)
    if unused:
        option = f"--{unused[0].replace('_', '-')}"
        raise ConfigError("in 8 bits a row has one scale, so this would change nothing", place=option, next_step="--bits 4")
    if looks_like_path(base) and not exists(Path(base).expanduser()):
        raise BaseModelError("no such folder", place=base, next_step=missing_hint(base))
    if revision is not None and (looks_like_path(base) or base.startswith("builtin:")):
        raise ConfigError("only hub ids have revisions", place="--revision", found=f"{revision} of {base}")
    require_empty(out)
    from qlora.quant.prepare import run_prepare

    typer.echo(str(run_prepare(base, out, revision=revision, dtype=model.dtype, quantization=model.quantization)))


def _checked(stated: dict[str, Any]) -> ModelConfig:
    """What was given, held to the schema of the job file. Raises ConfigError."""
    try:
        return ModelConfig.model_validate(stated)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = fault["loc"][-1]
        raise ConfigError(
            "cannot be used",
            place=f"--{str(name).replace('_', '-')}",
            found=fault["input"],
            wanted=_choices({**MODEL, **QUANTIZATION}[str(name)]).replace("|", ", "),
        ) from error
