"""`tpcheck topology`, `tpcheck families` and `tpcheck doctor`, which run nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.option_values import json_object
from tpcheck.cli.terminal import show, usage_errors
from tpcheck.core.topology import Topology
from tpcheck.families.build import Listed
from tpcheck.lab.known import register
from tpcheck.report.table import Cell, Column, Row, Table, table_lines
from tpcheck.report.words import Line, labelled, plain


def topology_lines(topology: Topology) -> Iterator[Line]:
    """Yield the coordinates of every rank, and the groups of every axis."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in topology.sizes.items())
    yield plain(f"world {topology.world_size}: {sizes} (the last axis is innermost)", "bold")
    yield Line()
    axes = tuple(topology.sizes)
    columns = tuple(Column(name, right=True, width=4) for name in ("rank", *axes))
    numbers = ((rank, *(topology.coordinate(rank)[axis] for axis in axes)) for rank in range(topology.world_size))
    rows = tuple(Row(tuple(Cell(str(number)) for number in row)) for row in numbers)
    yield from table_lines(Table(columns, rows, has_heading=True, indent=2))
    yield Line()
    for axis in reversed(axes):
        groups = (f"({', '.join(map(str, group))})" for group in topology.groups(axis))
        yield from labelled(f"{axis} groups", " ".join(groups))


def family_lines(families: Sequence[Listed]) -> Iterator[Line]:
    """Yield one line for each family, with its plan and its known bugs."""
    rows = []
    for listed in families:
        bugs = ", ".join(bug.name for bug in register() if listed.family in bug.families)
        plan = "tp_plan" if listed.has_plan else ""
        rows.append(Row((Cell(listed.family), Cell(plan, "green"), Cell(bugs, "dim"))))
    yield from table_lines(Table((Column("family"), Column("plan"), Column("known bugs")), tuple(rows)))
    yield Line()
    planned = sum(listed.has_plan for listed in families)
    yield plain(f"{len(families)} families, {planned} with a tp_plan of their own", "dim")


def topology(
    world: Annotated[int, typer.Option(help="Number of ranks.")],
    tp: Annotated[int, typer.Option(help="Ranks of a tensor-parallel group.")] = 1,
) -> None:
    """Print the coordinates of every rank, and the groups of every axis.

    \b
    tpcheck topology --world 8 --tp 2
    """
    with usage_errors():
        show(topology_lines(Topology.of(world_size=world, tp=tp)))


def families(
    table: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Print the results in F, from `verify --json F`, as a table in Markdown."),
    ] = None,
) -> None:
    """Print every model type that `tpcheck verify` accepts, whether it has a tp_plan, and its known upstream bugs.

    \b
    tpcheck families | grep qwen
    tpcheck families --table matrix.json
    """
    if table is not None:
        from tpcheck.lab.matrix import families_page

        with usage_errors():
            show(families_page(table))
        return
    from tpcheck.families.build import listed  # loads transformers

    with usage_errors():
        show(family_lines(listed()))


def doctor(
    ds_config: Annotated[
        str | None, typer.Argument(metavar="[DS_CONFIG.json]", help="A DeepSpeed configuration to check.")
    ] = None,
) -> None:
    """Print versions and devices, and problems of this machine and of a DeepSpeed configuration.

    \b
    tpcheck doctor
    tpcheck doctor ds_config.json

    Exit status: 0 no problems, 1 findings, 2 bad usage.
    """
    from tpcheck.doctor.diagnosis import diagnose, diagnosis_lines

    with usage_errors():
        diagnosis = diagnose(json_object("ds_config", ds_config) if ds_config is not None else None)
        show(diagnosis_lines(diagnosis))
    raise typer.Exit(1 if diagnosis.advice else 0)
