"""`tpcheck topology`, `tpcheck families` and `tpcheck doctor`: nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.options import json_object
from tpcheck.cli.terminal import show, usage_errors
from tpcheck.core.topology import Topology
from tpcheck.families.build import Listed
from tpcheck.lab.known import register
from tpcheck.report.words import Line, labelled, plain


def topology_lines(topology: Topology) -> Iterator[Line]:
    """Yield every rank's place and every axis's groups."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in topology.sizes.items())
    yield plain(f"world {topology.world_size}: {sizes} (the last axis is innermost)", "bold")
    yield Line()
    axes = tuple(topology.sizes)
    yield plain("  rank  " + "  ".join(f"{axis:>4}" for axis in axes), "dim")
    for rank in range(topology.world_size):
        place = topology.coordinate(rank)
        yield plain(f"  {rank:>4}  " + "  ".join(f"{place[axis]:>4}" for axis in axes))
    yield Line()
    for axis in reversed(axes):
        groups = (f"({', '.join(map(str, group))})" for group in topology.groups(axis))
        yield from labelled(f"{axis} groups", " ".join(groups))


def family_lines(families: Sequence[Listed]) -> Iterator[Line]:
    """Yield one line for each family, with its plan and its known bugs."""
    width = max(len(one.family) for one in families)
    for one in families:
        bugs = [bug.name for bug in register() if one.family in bug.families]
        plan = "tp_plan" if one.has_plan else ""
        yield Line(
            ((f"{one.family:<{width}}  ", ""), (f"{plan:<7}", "green"), (f"  {', '.join(bugs)}" if bugs else "", "dim"))
        )
    yield Line()
    planned = sum(one.has_plan for one in families)
    yield plain(f"{len(families)} families, {planned} with a tp_plan of their own", "dim")


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
        from tpcheck.lab.matrix.report import table_lines

        with usage_errors():
            show(table_lines(table))
        return
    from tpcheck.families.build import listed  # loads transformers

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
    from tpcheck.doctor.diagnosis import diagnose, diagnosis_lines

    with usage_errors():
        diagnosis = diagnose(json_object("ds_config", ds_config) if ds_config is not None else None)
        show(diagnosis_lines(diagnosis))
    raise typer.Exit(1 if diagnosis.advice else 0)
