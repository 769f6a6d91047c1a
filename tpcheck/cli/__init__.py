"""The command line: options and wiring. A command loads torch only when it runs a model."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer

import tpcheck
from tpcheck.cli.compare import checkpoint, compare
from tpcheck.cli.faults import faults
from tpcheck.cli.fuzz import fuzz
from tpcheck.cli.inspect import doctor, families, topology
from tpcheck.cli.terminal import escape_unencodable_output
from tpcheck.cli.verify import verify
from tpcheck.core.guides import START

app = typer.Typer(
    name="tpcheck",
    no_args_is_help=True,
    epilog=f"Exit status of all: 0 passed, 1 findings, 2 bad usage, 3 the system under test crashed. Start: {START}",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command(no_args_is_help=True)(verify)
app.command(no_args_is_help=True)(checkpoint)
app.command(no_args_is_help=True)(compare)
app.command()(topology)
app.command()(families)
app.command()(doctor)
app.command()(faults)
app.command(no_args_is_help=True)(fuzz)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"tpcheck {tpcheck.__version__}")
        raise typer.Exit


def _print_schema(is_asked: bool) -> None:
    if is_asked:
        typer.echo((files("tpcheck.report") / "schema.json").read_text(encoding="utf-8"), nl=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    json_schema: Annotated[
        bool,
        typer.Option(
            "--json-schema",
            callback=_print_schema,
            is_eager=True,
            help="Print the JSON Schema of all that --json writes, and exit.",
        ),
    ] = False,
) -> None:
    """Verify tensor-parallel training against the unsharded model: what differs, where it starts, and why."""


def main() -> None:
    """Entry point of the `tpcheck` command."""
    escape_unencodable_output()
    app()
