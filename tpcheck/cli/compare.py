"""`tpcheck checkpoint ACTUAL REFERENCE` and `tpcheck compare ACTUAL.trace EXPECTED.trace`: files that runs left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tpcheck.checkpoints.verify import CASTS, verify_checkpoint
from tpcheck.cli.option_values import full_dtype, writable
from tpcheck.cli.terminal import BAD_USAGE, Files, bytes_bar, is_reporting_rank, usage_errors, write_report
from tpcheck.core.errors import UsageError
from tpcheck.core.name_maps import parse_maps
from tpcheck.core.paths import existing_path
from tpcheck.core.topology import Topology
from tpcheck.report.report import Report
from tpcheck.world.attach import attach, is_launched, launched_rank
from tpcheck.world.rank import Rank

Json = Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the report as JSON.")]
Junit = Annotated[Path | None, typer.Option(metavar="F", help="Write the report as JUnit XML.")]
Html = Annotated[Path | None, typer.Option(metavar="F", help="Write the report as an HTML page.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show every finding.")]
Maps = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="REGEX=REPLACEMENT",
        help="Rename ACTUAL's parameters and modules, or name a ready map: hf-megatron; repeatable.",
    ),
]


def checkpoint(
    actual: Annotated[str, typer.Argument(metavar="ACTUAL", help="The checkpoint that is judged: a file or a folder.")],
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The checkpoint that it should equal.")],
    dtype: Annotated[
        str | None, typer.Option(help="An intended cast: round the reference to this dtype first, such as bfloat16.")
    ] = None,
    earlier: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A checkpoint of an earlier step, to recognise stale weights; repeatable."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Unpickle arbitrary classes in a separate process. This runs code from the file."
        ),
    ] = False,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Leave out the states of optimizer, scheduler, scaler and generators."),
    ] = False,
    map_: Maps = None,
    json_: Json = None,
    junit: Junit = None,
    html: Html = None,
    verbose: Verbose = False,
) -> None:
    """Compare a checkpoint bitwise with a reference, and explain each tensor that differs.

    Formats are recognised: safetensors, transformers' shards, pytorch_model.bin, torch DCP, DeepSpeed
    training and universal checkpoints, PEFT adapters, Megatron torch_dist. Shards of TP and ZeRO ranks are
    merged first. Optimizer, scheduler, scaler and generators are compared where both sides have them.

    \b
    tpcheck checkpoint saved/ reference/
    tpcheck checkpoint saved/global_step2 model.safetensors
    tpcheck checkpoint saved/ reference/ --dtype bfloat16 --json report.json
    tpcheck checkpoint iter_0000010/ llama/ --map hf-megatron

    Under torchrun or srun the ranks divide the reading, and rank 0 writes the report:

    \b
    torchrun --nproc-per-node 8 -m tpcheck checkpoint saved/ reference/

    Exit status: 0 equal, 1 findings, 2 bad usage, a damaged file, or nothing to compare.
    """
    with usage_errors():
        files = Files(writable("json", json_), writable("junit", junit), writable("html", html))
        maps = parse_maps(map_ or [])
        if dtype is not None and full_dtype(dtype).removeprefix("torch.") not in CASTS:
            raise UsageError("dtype", dtype, CASTS)
        rank = _rank_of_launcher()
        sources = [("actual", actual), ("reference", reference), *(("earlier", path) for path in earlier or ())]
        for name, path in sources if rank is None else ():  # of ranks, one alone may lack the path: all learn it below
            existing_path(name, path)
    with _ending_together(rank):
        with usage_errors(on_every_rank=False), bytes_bar("compare") as progress:
            report = verify_checkpoint(
                actual,
                reference,
                dtype=dtype and full_dtype(dtype),
                earlier=earlier or (),
                allow_pickle=allow_pickle,
                weights_only=weights_only,
                names=maps,
                rank=rank,
                progress=progress,
            )
        _end(report, files, verbose=verbose)


def compare(
    actual: Annotated[str, typer.Argument(metavar="ACTUAL.trace", help="The trace of the run that is judged.")],
    expected: Annotated[str, typer.Argument(metavar="EXPECTED.trace", help="The trace that it should equal.")],
    more_actual: Annotated[
        list[str] | None,
        typer.Option("--actual", metavar="FOLDER", help="ACTUAL's folder on another node; repeatable."),
    ] = None,
    more_expected: Annotated[
        list[str] | None,
        typer.Option("--expected", metavar="FOLDER", help="EXPECTED's folder on another node; repeatable."),
    ] = None,
    map_: Maps = None,
    json_: Json = None,
    junit: Junit = None,
    html: Html = None,
    verbose: Verbose = False,
) -> None:
    """Find where two training runs first part, and whether that is rounding or a mistake.

    Any two: tp 1 and tp 2, two versions, dtypes or frameworks, a run and itself.
    Each rank of a training script records; replays=2, in at least one of the two,
    measures what rounding may do:

    \b
        with tpcheck.record(model, "tp2.trace", optimizer=optimizer, replays=2):
            train()

    Then compare what was recorded:

    \b
    tpcheck compare tp2.trace tp1.trace
    tpcheck compare tp2.trace tp1.trace --html runs.html
    tpcheck compare node0.trace,node1.trace tp1.trace
    tpcheck compare new.trace old.trace --map '^net[.]=model.'
    tpcheck compare megatron.trace llama.trace --map hf-megatron

    Exit status: 0 they agree, 1 findings, 2 bad usage, a damaged trace, or nothing that can be decided.
    """
    with usage_errors():
        files = Files(writable("json", json_), writable("junit", junit), writable("html", html))
        names = parse_maps(map_ or [])
        sides = {"actual": _folders(actual, more_actual), "expected": _folders(expected, more_expected)}
        for name, folders in sides.items():
            for folder in folders:
                existing_path(name, folder)
        from tpcheck.runs.comparing.compare import compare_traces  # loads torch

        report = compare_traces(sides["actual"], sides["expected"], names=names)
    _end(report, files, verbose=verbose)


def _rank_of_launcher() -> Rank | None:
    """Return this process's place among the ranks of a launcher, None without one."""
    if not is_launched():
        return None
    _, world_size, _ = launched_rank(os.environ)
    return attach(Topology.of(world_size=world_size, tp=1), device="cpu")


@contextmanager
def _ending_together(rank: Rank | None) -> Iterator[None]:
    """Let no rank end before rank 0 has written: a launcher ends the others when one exits with an error."""
    try:
        yield
    finally:
        if rank is not None:
            with suppress(RuntimeError):  # a rank has ended already
                rank.gather(None)


def _folders(path: str, more: list[str] | None) -> list[str]:
    """Return the folders: a path that exists is one, even with a comma in its name."""
    first = [path] if Path(path).exists() else [part for part in path.split(",") if part]
    return [*first, *(more or [])]


def _end(report: Report, files: Files, *, verbose: bool) -> NoReturn:
    """Write the report, and exit: 0 passed, 1 findings, 2 nothing compared or not written."""
    is_written = not is_reporting_rank() or write_report(report, files, verbose=verbose)
    status = {"passed": 0, "failed": 1}.get(report.verdict.verdict, BAD_USAGE)
    raise typer.Exit(status if is_written else BAD_USAGE)
