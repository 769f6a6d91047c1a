"""The command line: options and wiring, no logic. Commands load torch only when they run a model."""

from __future__ import annotations

import typer

from tpcheck.cli.checkpoint import checkpoint
from tpcheck.cli.compare import compare
from tpcheck.cli.faults import faults
from tpcheck.cli.fuzz import fuzz
from tpcheck.cli.inspect import doctor, families, topology
from tpcheck.cli.terminal import escape_what_the_terminal_cannot_show
from tpcheck.cli.verify import verify

app = typer.Typer(
    name="tpcheck",
    help="Tells whether tensor-parallel training is right, and where and why it is not.",
    no_args_is_help=True,
    add_completion=False,
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


def main() -> None:
    """Entry point of the `tpcheck` command."""
    escape_what_the_terminal_cannot_show()
    app()
