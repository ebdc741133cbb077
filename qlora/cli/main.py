"""The `qlora` command: one file a verb, and one place that turns every way to end into an exit code.

Torch takes seconds to import. A verb therefore reads and checks everything it was given first and imports what does
the work after that, inside the function; `qlora --help` and a mistake in a job file are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from qlora.cli import evaluate, export, failures, generate, inspect, merge, plan, prepare, schema, slurm, status, stop, train
from qlora.errors import EXIT_BUG, EXIT_DONE, QloraError
from qlora.version import __version__

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="qlora",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("prepare")(prepare.prepare)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("slurm")(slurm.slurm)
app.command("status")(status.status)
app.command("stop")(stop.stop)
app.command("schema")(schema.schema)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qlora {__version__}")
        raise typer.Exit


@app.callback()
def _qlora(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distributed QLoRA: a 4-bit base, LoRA layers, sharded training, adapters that load everywhere.

    Every verb takes -h. Exit codes: 0 done, 2 an error you can mend, 1 a bug or a lost rank, 75 stopped on request, saved.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; errors are on standard error by then.

    A QloraError is printed in a few lines (2; 1 where a rank was lost), anything else with its traceback (1). Usage errors
    are 2, an interrupt is 130. Tokens that stand in the environment never reach the text.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        get_command(app)(args=arguments, prog_name="qlora")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_DONE if end.code is None else EXIT_BUG
    except QloraError as error:
        failures.print_error(error, with_traceback="--debug" in arguments)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        failures.print_traceback()
        return EXIT_BUG
    return EXIT_DONE
