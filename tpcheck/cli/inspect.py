"""`tpcheck topology`, `tpcheck families` and `tpcheck doctor`: nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.options import json_object
from tpcheck.cli.terminal import show, usage_errors
from tpcheck.report.layout import topology_lines
from tpcheck.topology import Topology


def topology(
    world: Annotated[int, typer.Option(help="Number of ranks.")],
    tp: Annotated[int, typer.Option(help="Ranks of a tensor-parallel group.")] = 1,
) -> None:
    """Print who sits where, and which groups exist.

    \b
    tpcheck topology --world 8 --tp 2
    """
    with usage_errors():
        show(topology_lines(Topology.of(world_size=world, tp=tp)))


def families(
    table: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Print what a run of `verify --json F` found, as a table in Markdown."),
    ] = None,
) -> None:
    """Print every model type that `tpcheck verify` takes, whether it brings a plan, and its known upstream bugs.

    \b
    tpcheck families | grep qwen
    tpcheck families --table matrix.json
    """
    if table is not None:
        from tpcheck.report.families_table import table_lines

        with usage_errors():
            show(table_lines(table))
        return
    from tpcheck.families.listing import listed  # loads transformers
    from tpcheck.report.families import family_lines

    with usage_errors():
        show(family_lines(listed()))


def doctor(
    ds_config: Annotated[
        str | None, typer.Argument(metavar="[DS_CONFIG.json]", help="A DeepSpeed configuration to look into.")
    ] = None,
) -> None:
    """Print versions, devices, and what on this machine or in a configuration will not do what it seems to.

    \b
    tpcheck doctor
    tpcheck doctor ds_config.json

    Exit status: 0 nothing is wrong, 1 findings, 2 bad usage.
    """
    from tpcheck.doctor import diagnose
    from tpcheck.report.doctor import diagnosis_lines

    with usage_errors():
        diagnosis = diagnose(json_object("ds_config", ds_config) if ds_config is not None else None)
        show(diagnosis_lines(diagnosis))
    raise typer.Exit(1 if diagnosis.advice else 0)
