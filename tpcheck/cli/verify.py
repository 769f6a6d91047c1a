"""`tpcheck verify TARGET...`"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tpcheck.cli.matrix import Matrix, run_matrix
from tpcheck.cli.option_values import (
    dtypes,
    full_dtype,
    integers,
    json_object,
    name_or_object,
    names,
    settings,
    writable,
)
from tpcheck.cli.terminal import Files, usage_errors
from tpcheck.core.check_names import ON_REQUEST
from tpcheck.core.deepspeed_config import implied_options
from tpcheck.core.errors import UsageError
from tpcheck.lab.matrix import Cell, cells, combinations, require_usable_values
from tpcheck.model.options import DEFAULTS, RunOptions, Tokens, option_help
from tpcheck.model.targets import is_family
from tpcheck.report.report import Report

_PARSED = {"backend", "dtype", "optimizer", "attention", "experts", "lora", "config", "checks"}
"""Options whose flag `verify` parses; the flag of every other option gives the value itself."""

BACKENDS = ("deepspeed", "transformers", "dtensor", "megatron", "custom", "deepspeed-tp-model-init")
"""What `--help` names, the usual ones first; others may be installed."""

_model_option = partial(typer.Option, rich_help_panel="What is verified")
_training_option = partial(typer.Option, rich_help_panel="How both sides train")
_run_option = partial(typer.Option, rich_help_panel="How it is run")
_output_option = partial(typer.Option, rich_help_panel="What is written")


def verify(
    context: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET...",
            help="Model types of transformers (llama, qwen3, t5), folders or config.json files, file.py:function.",
        ),
    ] = None,
    all_: Annotated[
        bool,
        _model_option("--all", help="Every causal language model type of the installed transformers."),
    ] = False,
    backend: Annotated[
        str,
        _model_option(
            metavar="NAME[,..]",
            help=f"{option_help('backend').removesuffix('.')}: {', '.join(BACKENDS)}, or another installed one.",
        ),
    ] = str(DEFAULTS.backend),
    tp: Annotated[str, _model_option(metavar="N[,..]", help="Ranks of a tensor-parallel group.")] = str(
        DEFAULTS.topology.tp
    ),
    dp: Annotated[
        str,
        _model_option(metavar="N[,..]", help="Data-parallel replicas. tp x dp processes are run."),
    ] = str(DEFAULTS.topology.dp),
    zero: Annotated[str, _model_option(metavar="N[,..]", help=option_help("zero_stage"))] = str(DEFAULTS.zero_stage),
    dtype: Annotated[str, _model_option(metavar="NAME[,..]", help=option_help("dtype", 2))] = DEFAULTS.dtype,
    device: Annotated[
        str | None,
        _model_option(metavar="cpu|cuda", help=option_help("device"), show_default="cuda where each rank has a GPU"),
    ] = DEFAULTS.device,
    set_: Annotated[
        list[str] | None,
        _model_option("--set", metavar="KEY=VALUE", help="Change the model's configuration; repeatable."),
    ] = None,
    full: Annotated[bool, _model_option("--full", help=option_help("full"))] = DEFAULTS.full,
    config: Annotated[str | None, _model_option(metavar="JSON|FILE", help=option_help("config", 2))] = None,
    ignore_plan: Annotated[
        bool, _model_option("--ignore-plan", help=option_help("ignore_plan"))
    ] = DEFAULTS.ignore_plan,
    checks: Annotated[
        list[str] | None,
        _model_option(
            metavar="NAME",
            help="Run only this check, or all; repeatable.",
            show_default=f"all except {', '.join(ON_REQUEST)}",
        ),
    ] = None,
    steps: Annotated[int, _training_option(help=option_help("steps"))] = DEFAULTS.steps,
    optimizer: Annotated[str, _training_option(metavar="NAME|JSON|FILE", help=option_help("optimizer"))] = str(
        DEFAULTS.optimizer
    ),
    accumulate: Annotated[int, _training_option(help=option_help("accumulate"))] = DEFAULTS.accumulate,
    loss: Annotated[str, _training_option(metavar="mean|token_mean", help=option_help("loss", 3))] = DEFAULTS.loss,
    batch: Annotated[
        str | None,
        _training_option(metavar="RxL[,padded][,strided]", help=option_help("batch"), show_default=str(Tokens())),
    ] = None,
    attention: Annotated[
        str | None,
        _training_option(metavar="NAME[,..]", help=option_help("attention"), show_default="the model's own"),
    ] = DEFAULTS.attention,
    experts: Annotated[
        str | None,
        _training_option(metavar="NAME[,..]", help=option_help("experts"), show_default="the model's own"),
    ] = DEFAULTS.experts,
    checkpointing: Annotated[
        bool, _training_option("--checkpointing", help=option_help("checkpointing"))
    ] = DEFAULTS.checkpointing,
    reentrant: Annotated[bool, _training_option("--reentrant", help=option_help("reentrant"))] = DEFAULTS.reentrant,
    compile_: Annotated[bool, _training_option("--compile", help=option_help("compile"))] = DEFAULTS.compile,
    compile_layers: Annotated[
        bool, _training_option("--compile-layers", help=option_help("compile_layers"))
    ] = DEFAULTS.compile_layers,
    lora: Annotated[str, _training_option(metavar="R[,..]|JSON|FILE", help=option_help("lora"))] = str(DEFAULTS.lora),
    loop: Annotated[str, _training_option(metavar="plain|trainer", help=option_help("loop", 2))] = DEFAULTS.loop,
    seed: Annotated[int, _training_option(help=option_help("seed"))] = DEFAULTS.seed,
    jobs: Annotated[
        int | None,
        _run_option(help="Runs at the same time.", show_default="as many as fit the cores"),
    ] = None,
    timeout: Annotated[float, _run_option(help=option_help("timeout"))] = DEFAULTS.timeout,
    known: Annotated[
        bool | None,
        _run_option(
            "--known/--no-known",
            help="Compare results with the register of known upstream bugs.",
            show_default="with --all",
        ),
    ] = None,
    json_: Annotated[
        Path | None,
        _output_option("--json", metavar="F", help="Write results to F as JSON; a matrix resumes from F."),
    ] = None,
    fresh: Annotated[bool, _output_option("--fresh", help="Ignore earlier results in F.")] = False,
    junit: Annotated[Path | None, _output_option(metavar="F", help="Write the report as JUnit XML.")] = None,
    html: Annotated[Path | None, _output_option(metavar="F", help="Write an HTML page with every finding.")] = None,
    summary: Annotated[
        Path | None,
        _output_option(metavar="F", help="Append a Markdown table to F.", show_default="$GITHUB_STEP_SUMMARY"),
    ] = None,
    verbose: Annotated[
        bool,
        _output_option("--verbose", help="Show every finding, and of a matrix every report."),
    ] = False,
) -> None:
    """Shard a small model, train it beside the unsharded one, and report where they differ.

    \b
    tpcheck verify llama --tp 2
    tpcheck verify llama qwen3 opt --tp 2 --dp 2 --zero 1 --jobs 2 --json report.json
    tpcheck verify phi --set qk_layernorm=true
    tpcheck verify llama --checks checkpoint_matches_reference
    tpcheck verify bloom --config '{"tensor_parallel": {"preset_model": "bloom"}}'

    Of a folder of transformers (or its config.json, or a hub id in the local cache) the configuration is
    made small, in proportion; a function, imported on the ranks, makes a model of your own. --config takes
    your DeepSpeed file as it is, and flags that are not given follow it:

    \b
    tpcheck verify ./my-model --config ds_config.json --tp 8 --dp 2 --accumulate 4 --checks all
    tpcheck verify my_model.py:build --tp 2 --backend custom

    custom shards by the function shard(model, rank) that stands beside build in my_model.py, with the
    placements in layout; batch there gives the inputs. Without it, DeepSpeed shards what it knows.

    Several families, backends, sizes or stages make a matrix. A crash or hang of one cell does not end
    it, and with --json it continues an interrupted run:

    \b
    tpcheck verify --all --backend deepspeed,transformers --json matrix.json --html matrix.html
    tpcheck verify llama qwen3 --tp 2,4 --dp 1,2 --zero 0,1,2,3
    tpcheck verify qwen3_moe --backend transformers --attention eager,sdpa --experts eager,batched_mm

    Exit status: 0 passed, 1 findings, 2 bad usage or a report that cannot be written, 3 the system
    under test crashed. With several cells: 2 if any is bad usage, else 1 if any has findings, else 3 if
    any crashed. With --all (or --known) a known upstream bug is no finding, but a new or missing one is.
    130 interrupted, 143 terminated.
    """
    with usage_errors():
        given = {
            option.name: context.params[option.name]
            for option in fields(RunOptions)
            if option.name in context.params and option.name not in _PARSED
        }
        common = RunOptions.of(
            **given,
            compile=compile_,
            optimizer=name_or_object("optimizer", optimizer),
            lora=name_or_object("lora", lora, marks=",-."),
            settings=settings(set_ or []),
            config=json_object("config", config) if config is not None else None,
            checks=checks or None,
        )
        tp, zero, dtype, accumulate = _with_config(context, common.config, backend, tp, zero, dtype, accumulate)
        common = replace(common, accumulate=accumulate)
        if jobs is not None and jobs < 1:
            raise UsageError("jobs", jobs, "a positive integer")
        combined = combinations(
            common,
            backend=names("backend", backend),
            tp=integers("tp", tp),
            dp=integers("dp", dp),
            zero=integers("zero", zero),
            dtype=dtypes(dtype),
            attention=names("attention", attention) if attention is not None else (),
            experts=names("experts", experts) if experts is not None else (),
        )
        require_usable_values(combined)
        github = os.environ.get("GITHUB_STEP_SUMMARY")
        summary = summary or (Path(github) if github else None)
        files = Files(
            writable("json", json_), writable("junit", junit), writable("html", html), writable("summary", summary)
        )
        requested_cells = cells(_targets(targets or [], all_), combined)

    def verify_one(cell: Cell) -> Report:
        from tpcheck.model.verify import verify_family  # loads torch, which --help and bad usage need not wait for

        return verify_family(cell.family, **cell.options.keywords())

    matrix = Matrix(requested_cells, all_families=all_, with_register=all_ if known is None else known, fresh=fresh)
    raise typer.Exit(run_matrix(matrix, verify_one, files, jobs=jobs, verbose=verbose))


def _with_config(
    context: typer.Context, config: Mapping[str, Any], backend: str, tp: str, zero: str, dtype: str, accumulate: int
) -> tuple[str, str, str, int]:
    """Return these flags, with the values of a DeepSpeed configuration for those that were not given.

    Raises:
        UsageError: A flag that was given contradicts the configuration.
    """
    flags: dict[str, Any] = {"tp": tp, "zero": zero, "dtype": dtype, "accumulate": accumulate}
    if not all(name.startswith("deepspeed") for name in names("backend", backend)):
        return tp, zero, dtype, accumulate
    for option, (key, value) in implied_options(config).items():
        source = context.get_parameter_source(option)
        if source is not None and source.name == "DEFAULT":
            flags[option] = type(flags[option])(value)
            continue
        given = {full_dtype(part.strip()) for part in str(flags[option]).split(",")}
        if str(value) not in given:
            raise UsageError(option, flags[option], f"{value}, as {key} of the configuration says, or no --{option}")
    return flags["tp"], flags["zero"], flags["dtype"], flags["accumulate"]


def _targets(named: list[str], every: bool) -> list[str]:
    from tpcheck.families.build import causal_types, type_and_head

    if not every:
        if not named:
            raise UsageError("target", "", "a model type of transformers, a folder, file.py:function, or --all")
        for name in filter(is_family, named):
            type_and_head(name)
        return named
    if named:
        raise UsageError("all", " ".join(named), "either --all or targets")
    return list(causal_types())
