"""`tpcheck verify FAMILY...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.matrix import Matrix, run_matrix
from tpcheck.cli.options import integers, json_object, names, settings, writable
from tpcheck.cli.results import Files, summary_path
from tpcheck.cli.terminal import usage_errors
from tpcheck.core.errors import UsageError
from tpcheck.lab.matrix.cells import Cell, cells
from tpcheck.model.options import DEFAULTS, RunOptions
from tpcheck.report.report import Report


def verify(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="FAMILY...", help="Model types of transformers: llama, qwen3, t5.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Every causal language model type of the installed transformers.")
    ] = False,
    backend: Annotated[str, typer.Option(metavar="NAME[,..]", help="What shards the model.")] = str(DEFAULTS.backend),
    tp: Annotated[str, typer.Option(metavar="N[,..]", help="Ranks of a tensor-parallel group.")] = str(
        DEFAULTS.topology.tp
    ),
    dp: Annotated[str, typer.Option(metavar="N[,..]", help="Data-parallel replicas.")] = str(DEFAULTS.topology.dp),
    zero: Annotated[str, typer.Option(metavar="N[,..]", help="ZeRO stage of the backend, 0 to 3.")] = str(
        DEFAULTS.zero_stage
    ),
    dtype: Annotated[
        str, typer.Option(metavar="NAME[,..]", help="float64 separates bugs from rounding best.")
    ] = DEFAULTS.dtype,
    steps: Annotated[int, typer.Option(help="Training steps.")] = DEFAULTS.steps,
    jobs: Annotated[
        int | None, typer.Option(help="Concurrent worlds. [default: as many as fit the cores]", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the model's configuration; repeatable."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="JSON|FILE", help="Backend configuration, merged over tpcheck's.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="RxL[,padded][,strided]", help="Samples and tokens that a DP rank sees. [default: 2x16]"),
    ] = None,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="Drop the model's own tp_plan: the backend's heuristics shard it.")
    ] = DEFAULTS.ignore_plan,
    checks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run this check alone; repeatable. Without it, all but the saved model's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and replays.")] = DEFAULTS.seed,
    timeout: Annotated[float, typer.Option(help="Seconds until a run that hangs is ended.")] = DEFAULTS.timeout,
    known: Annotated[
        bool | None,
        typer.Option(
            "--known/--no-known",
            help="Compare results with the register of known upstream bugs. [default: with --all]",
            show_default=False,
        ),
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="F", help="Write JSON; a matrix continues the run in F.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run cells again that are in F.")] = False,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write an HTML page with every finding.")] = None,
    summary: Annotated[
        Path | None, typer.Option(metavar="F", help="Append a Markdown table to F. [default: $GITHUB_STEP_SUMMARY]")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every finding, and the checks that passed.")] = False,
) -> None:
    """Shard a small model, train it beside the unsharded one, and report where they differ.

    \b
    tpcheck verify llama --tp 2
    tpcheck verify llama qwen3 opt --tp 2 --dp 2 --zero 1 --jobs 2 --json report.json
    tpcheck verify phi --set qk_layernorm=true
    tpcheck verify llama --checks checkpoint_matches_reference
    tpcheck verify bloom --config '{"tensor_parallel": {"preset_model": "bloom"}}'

    Several families, backends, sizes or stages make a matrix. A crash or hang of one cell does not end
    it, and with --json it continues an interrupted run:

    \b
    tpcheck verify --all --backend deepspeed,transformers --json matrix.json --html matrix.html
    tpcheck verify llama qwen3 --tp 2,4 --dp 1,2 --zero 0,1,2,3

    Exit status: 0 passed, 1 findings, 2 bad usage or a report that cannot be written, 3 the system
    under test crashed. For several cells the first of 2, 1, 3 that applies. With --all (or --known)
    a known upstream bug is no finding, but a new or missing one is. 130 interrupted.
    """
    with usage_errors():
        common = RunOptions.of(
            steps=steps,
            seed=seed,
            settings=settings(set_ or []),
            config=json_object("config", config) if config is not None else None,
            checks=checks or None,
            ignore_plan=ignore_plan,
            timeout=timeout,
            batch=batch,
        )
        if jobs is not None and jobs < 1:
            raise UsageError("jobs", jobs, "a positive integer")
        asked_for = cells(
            _families(families or [], all_),
            common,
            backend=names("backend", backend),
            tp=integers("tp", tp),
            dp=integers("dp", dp),
            zero=integers("zero", zero),
            dtype=names("dtype", dtype),
        )
        files = Files(writable("json", json_), writable("junit", junit), writable("html", html), summary_path(summary))

    def verify_one(cell: Cell) -> Report:
        from tpcheck.model.verify import verify_family  # loads torch, which --help and bad usage need not wait for

        return verify_family(cell.family, **cell.options.keywords())

    matrix = Matrix(asked_for, all_families=all_, with_register=all_ if known is None else known, fresh=fresh)
    raise typer.Exit(run_matrix(matrix, verify_one, files, jobs=jobs, verbose=verbose))


def _families(named: list[str], every: bool) -> list[str]:
    if not every:
        if not named:
            raise UsageError("family", "", "a model type of transformers, or --all")
        return list(dict.fromkeys(named))
    if named:
        raise UsageError("all", " ".join(named), "either --all or names of families")
    from tpcheck.families.build import causal_types

    return list(causal_types())
