"""`tpcheck topology`, `tpcheck families` and `tpcheck doctor`, which run nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tpcheck.cli.option_values import json_object, writable
from tpcheck.cli.terminal import BAD_USAGE, show, usage_errors, write_all
from tpcheck.core.topology import Topology
from tpcheck.families.build import Listed
from tpcheck.lab.known import register
from tpcheck.report.table import Cell, Column, Row, Table, table_lines
from tpcheck.report.words import Line, labelled, plain

Json = Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the result as JSON.")]


def topology_lines(topology: Topology) -> Iterator[Line]:
    """Yield the coordinates of every rank, and the groups of every axis."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in topology.sizes.items())
    experts = f"; ep={topology.ep} over consecutive ranks of the axes between pp and tp" if topology.ep > 1 else ""
    yield plain(f"world {topology.world_size}: {sizes} (the last axis is innermost{experts})", "bold")
    yield Line()
    axes = topology.axes
    columns = tuple(Column(name, right=True, width=4) for name in ("rank", *axes))
    numbers = ((rank, *(topology.coordinate(rank)[axis] for axis in axes)) for rank in range(topology.world_size))
    rows = tuple(Row(tuple(Cell(str(number)) for number in row)) for row in numbers)
    yield from table_lines(Table(columns, rows, has_heading=True, indent=2))
    yield Line()
    for axis in reversed(axes):
        groups = (f"({', '.join(map(str, group))})" for group in topology.groups(axis))
        yield from labelled(f"{axis} groups", " ".join(groups))


def topology_data(topology: Topology) -> dict[str, Any]:
    """Return coordinates and groups as JSON holds them."""
    return {
        "schema": 1,
        "world_size": topology.world_size,
        "sizes": dict(topology.sizes),
        "ranks": [{"rank": rank, **topology.coordinate(rank)} for rank in range(topology.world_size)],
        "groups": {axis: [list(group) for group in topology.groups(axis)] for axis in topology.axes},
    }


def family_lines(families: Sequence[Listed]) -> Iterator[Line]:
    """Yield one line for each family, with its head, its plan and its known bugs."""
    rows = []
    for listed in families:
        bugs = ", ".join(bug.name for bug in register() if listed.family in bug.families)
        plan = "tp_plan" if listed.has_plan else ""
        rows.append(Row((Cell(listed.family), Cell(listed.head), Cell(plan, "green"), Cell(bugs, "dim"))))
    columns = Column("family"), Column("head"), Column("plan"), Column("known bugs")
    yield from table_lines(Table(columns, tuple(rows)))
    yield Line()
    heads = Counter(listed.head for listed in families)
    counts = ", ".join(f"{number} {head}" for head, number in heads.items())
    planned = sum(listed.has_plan for listed in families)
    yield plain(f"{len(families)} families ({counts}), {planned} with a tp_plan of their own", "dim")


def topology(
    world: Annotated[int, typer.Option(help="Number of ranks.")],
    tp: Annotated[int, typer.Option(help="Ranks of a tensor-parallel group.")] = 1,
    cp: Annotated[int, typer.Option(help="Ranks that share a sequence.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    ep: Annotated[int, typer.Option(help="Ranks of dp and cp that share the experts of a layer.")] = 1,
    json_: Json = None,
) -> None:
    """Print who sits where, and which groups exist. What the other axes leave of the world is data-parallel.

    \b
    tpcheck topology --world 8 --tp 2
    tpcheck topology --world 32 --tp 8          # tp 8 x dp 4
    tpcheck topology --world 16 --tp 2 --cp 2 --pp 2
    tpcheck topology --world 8 --tp 2 --json topology.json
    """
    with usage_errors():
        sizes = Topology.of(world_size=world, tp=tp, cp=cp, pp=pp, ep=ep)
        json_ = writable("json", json_)
    _end(topology_lines(sizes), json_, topology_data(sizes), status=0)


def families(
    table: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="F", help="Print the results in F, from `verify --json F`, as tables in Markdown; repeatable."
        ),
    ] = None,
) -> None:
    """Print every model type that `tpcheck verify` takes: its head, whether it has a tp_plan, known upstream bugs.

    Of a type with several heads another one is named after a slash: bart/seq2seq, bert/masked.

    \b
    tpcheck families | grep qwen
    tpcheck families --table tp2.json --table tp4.json
    """
    if table:
        from tpcheck.lab.families_page import families_page

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
    json_: Json = None,
) -> None:
    """Print versions and devices, and problems of this machine and of a DeepSpeed configuration.

    \b
    tpcheck doctor
    tpcheck doctor ds_config.json

    With a configuration also which files each way of saving writes. A finding is broken (something does not do
    what it says), a trap (a usual next step goes wrong), or advice. Nothing is run.

    Exit status: 0 nothing is broken, 1 something is, 2 bad usage.
    """
    from tpcheck.doctor.diagnosis import diagnose, diagnosis_data, diagnosis_lines

    with usage_errors():
        json_ = writable("json", json_)
        diagnosis = diagnose(json_object("ds_config", ds_config) if ds_config is not None else None)
    _end(diagnosis_lines(diagnosis), json_, diagnosis_data(diagnosis), status=int(diagnosis.is_broken))


def _end(lines: Iterable[Line], path: Path | None, data: Mapping[str, Any], *, status: int) -> None:
    """Show the lines, write the file, and exit."""
    is_written = write_all(lines, (path, lambda: json.dumps(data, indent=2) + "\n"))
    raise typer.Exit(status if is_written else BAD_USAGE)
