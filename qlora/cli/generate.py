"""`qlora generate`: ask the base, with or without an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.adapter_folder import require_adapter
from qlora.cli.failures import DebugOption
from qlora.cli.loading import modules_that_stay
from qlora.errors import ConfigError, QloraError


def generate(
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What the user says; may be repeated.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A prompt a line, or .jsonl rows with the field prompt.", show_default=False),
    ] = None,
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
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write JSONL rows of prompt and answer here instead.", show_default=False),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Print what the model answers to each prompt.

    Many prompts are shared out over processes, and so is a base that fits no single GPU:

    accelerate launch --config_file launch/accelerate/zero3.yaml -m qlora generate --prompts FILE
    """
    if adapter is not None:
        require_adapter(adapter)
    asked = _all_prompts(prompt or [], prompts)
    if out is not None and _is_main():
        _refuse_to_overwrite(out)
    with modules_that_stay():
        from qlora.infer.generate import run_generate

    answers = run_generate(adapter, asked, base=base, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if not _is_main():
        return
    if out is not None:
        _write(out, asked, answers)
    elif len(asked) == 1:
        typer.echo(answers[0])
    else:
        for question, answer in zip(asked, answers, strict=True):
            typer.echo("> " + question.replace("\n", "\n> "))
            typer.echo(f"{answer}\n")


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _all_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Those of the command line, then those of the file. Raises ConfigError where there is none."""
    from qlora.infer.prompts import read_prompts

    found = [*given, *(read_prompts(file) if file is not None else [])]
    if not found:
        raise ConfigError("there is no prompt", place="command line", next_step="give --prompt TEXT or --prompts FILE")
    return found


def _refuse_to_overwrite(out: Path) -> None:
    if out.exists():
        raise QloraError("would overwrite what is there", place=str(out), wanted="a file that does not exist")
    if not out.absolute().parent.is_dir():
        raise QloraError("no such folder", place=str(out.parent), next_step=f"mkdir -p {out.parent}")


def _write(out: Path, prompts: Sequence[str], answers: Sequence[str]) -> None:
    from qlora.files import write_file

    rows = ({"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True))
    try:
        write_file(out, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
    except OSError as error:
        raise QloraError(f"the answers cannot be written ({error.strerror})", place=str(out)) from error
    typer.echo(f"{len(answers)} answers: {out}")
