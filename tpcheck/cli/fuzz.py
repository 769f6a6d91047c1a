"""`tpcheck fuzz FAMILY` and `tpcheck fuzz --layers`"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from tpcheck.cli.option_values import dtypes, integers, json_object, settings, writable
from tpcheck.cli.terminal import BAD_USAGE, INTERRUPTED, note, progress_bar, usage_errors, write_all
from tpcheck.core.errors import UsageError
from tpcheck.families.build import type_and_head
from tpcheck.lab.fuzz.report import (
    layers_data,
    layers_lines,
    outcome_line,
    searched_data,
    searched_json,
    searched_lines,
    verdict_of,
)
from tpcheck.lab.fuzz.results import Outcome, SearchResult, ShrunkFailure, Trial
from tpcheck.lab.fuzz.search import Bounds, Limits, require_hypothesis
from tpcheck.lab.matrix import combinations, require_usable
from tpcheck.model.options import DEFAULTS, RunOptions, option_help
from tpcheck.world.attach import is_launched

if TYPE_CHECKING:
    from tpcheck.lab.fuzz.layers import LayerCommon


@contextmanager
def progress_of(total: int) -> Iterator[Callable[..., None]]:
    """Yield a callback for each outcome that shows progress.

    Meanwhile standard output goes to standard error: DeepSpeed prints when it is imported.
    """
    columns = MofNCompleteColumn(), TimeElapsedColumn()
    with redirect_stdout(sys.stderr), progress_bar("starting", total, *columns) as update:

        def on_outcome(outcome: Outcome, *, shrinking: bool) -> None:
            if update is None:
                note(str(outcome_line(outcome, shrinking=shrinking)))
            else:
                ran = int(not shrinking and outcome.status != "refused")
                update(advance=ran, description="shrinking" if shrinking else outcome.status)

        yield on_outcome


_STATUS = {"passed": 0, "failed": 1, "skipped": BAD_USAGE, "error": 3}


def run_family(
    family: str, bounds: Bounds, common: RunOptions, limits: Limits, json_path: Path | None, *, known: bool
) -> int:
    """Search a family, and return the exit status."""
    from tpcheck.lab.fuzz.family import fuzz_family

    with progress_of(limits.examples) as on_outcome:
        searched = fuzz_family(family, bounds, common, limits, on_outcome, known=known)
    is_written = write_all(searched_lines(searched), (json_path, lambda: searched_json(searched_data(searched))))
    return exit_status([searched]) if is_written else BAD_USAGE


def run_layers(
    names: Sequence[str], trial: Trial | None, common: LayerCommon, limits: Limits, json_path: Path | None
) -> int:
    """Search layers one by one (those of these names, or all), or run one trial; return the exit status."""
    from tpcheck.lab.fuzz.layers import fuzz_layers, try_one

    if trial is not None:
        with progress_of(1):
            outcome = try_one(trial, common)
        found = (ShrunkFailure(outcome, outcome, outcome.command),) if outcome.is_bad else ()
        searched = [SearchResult({"layer": trial.layer, "backend": common.backend}, (outcome,), found)]
    else:
        with progress_of(limits.examples) as on_outcome:
            searched = list(fuzz_layers(names, common, limits, on_outcome))
    is_written = write_all(layers_lines(searched), (json_path, lambda: searched_json(layers_data(searched))))
    return exit_status(searched) if is_written else BAD_USAGE


def exit_status(searched: Sequence[SearchResult]) -> int:
    """Return 1 for findings, 3 for a crash, 2 if nothing could be run, 130 for Ctrl-C before any of them, or 0."""
    status = _STATUS[verdict_of(searched)]
    interrupted = any(search.interrupted for search in searched)
    return INTERRUPTED if interrupted and status in (0, BAD_USAGE) else status


def fuzz(
    family: Annotated[
        str | None, typer.Argument(metavar="[FAMILY]", help="A model type of transformers: llama, qwen3, t5.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Try the backend's layers one by one instead of a family.")
    ] = False,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --layers, try only this layer; repeatable.")
    ] = None,
    trial: Annotated[str | None, typer.Option(metavar="JSON", help="With --layers, repeat this one try.")] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="What shards the model.")] = str(DEFAULTS.backend),
    examples: Annotated[int, typer.Option(help="Configurations to run; what is refused does not count.")] = 200,
    seed: Annotated[int, typer.Option(help="Equal seeds draw equal configurations.")] = 0,
    tp: Annotated[
        str, typer.Option(metavar="N[,..]", help="Draw from these TP sizes; a failure shrinks to the first.")
    ] = "2,4",
    dp: Annotated[str, typer.Option(metavar="N[,..]", help="Draw from these data-parallel sizes.")] = "1,2",
    zero: Annotated[
        str, typer.Option(metavar="N[,..]", help="Draw from these ZeRO stages, as far as the backend has them.")
    ] = "0,1,2,3",
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME[,..]", help="Draw from these dtypes; float64 separates bugs from rounding best."),
    ] = "float64,float32,bfloat16",
    steps: Annotated[int, typer.Option(help="Training steps of each example.")] = DEFAULTS.steps,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Fix a setting of the model; repeatable. The others are drawn."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="JSON|FILE", help="Backend configuration of every example.")
    ] = None,
    ignore_plan: Annotated[bool, typer.Option("--ignore-plan", help=option_help("ignore_plan"))] = DEFAULTS.ignore_plan,
    known: Annotated[
        bool | None,
        typer.Option(
            "--known/--no-known",
            help="Do not report registered upstream bugs.",
            show_default="--known for a family, --no-known for layers",
        ),
    ] = None,
    shrink_seconds: Annotated[float, typer.Option(help="Time limit for shrinking a failure, in seconds.")] = 300,
    timeout: Annotated[float, typer.Option(help="Time limit of an example, in seconds.")] = 120,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the search as JSON.")] = None,
) -> None:
    """Draw configurations of a family (or of single layers), verify each, and shrink what fails.

    Drawn are: the sizes of tp and dp, the ZeRO stage, the dtype, uneven widths and numbers of heads, layers,
    vocabulary, every switch of the family's configuration (biases, tied embeddings), options of the backend
    that must not change the result (overlapped communication, bucket sizes, clipping), and the batch:
    samples, tokens, padding, contiguous in memory or not.

    \b
    tpcheck fuzz llama
    tpcheck fuzz qwen3 --examples 50 --tp 2 --dp 1 --zero 0 --dtype float64
    tpcheck fuzz phi --set qk_layernorm=false --json phi.json

    With --layers, every tensor-parallel layer of the backend is compared with the plain layer that it replaces:
    its output and the gradients of input, weight and bias, with uneven widths, and with inputs and gradients
    that are transposed, sliced or expanded in memory. Each layer gets --examples examples.

    \b
    tpcheck fuzz --layers
    tpcheck fuzz --layers --backend transformers --layer colwise --layer rowwise --known
    tpcheck fuzz --layers --trial '{"layer": "LinearLayer", "inputs": 2, "rows": [2], "strides": "transposed"}'

    A failure is shown with the command that reproduces it, and the one that it was shrunk from. A configuration
    that the model or the backend refuses with a reason is counted, but no finding; a crash is one.

    Exit status: 0 no findings, 1 findings, 2 bad usage or nothing could be run, 3 the system under test
    crashed, 130 interrupted.
    """
    with usage_errors():
        _require_valid(family, layers, layer, trial)
        json_ = writable("json", json_)
        common = RunOptions.of(
            backend=backend,
            steps=steps,
            settings=settings(set_ or []),
            config=json_object("config", config) if config is not None else None,
            ignore_plan=ignore_plan,
            timeout=timeout,
        )
        sizes = {"tp": integers("tp", tp), "dp": integers("dp", dp), "zero": integers("zero", zero)}
        bounds = Bounds.of(dtype=dtypes(dtype), **sizes)
        limits = Limits(examples, seed, shrink_seconds)
        require_hypothesis()
        require_usable(
            combinations(common, backend=[backend], tp=bounds.tp, dp=bounds.dp, zero=bounds.zero, dtype=bounds.dtype)
        )
        if family is not None:
            type_and_head(family)
        of_trial = Trial.parse(trial) if trial is not None else None
        if family is None:
            from tpcheck.lab.fuzz.layers import LayerCommon  # loads torch, which --help need not wait for

            of_layers = LayerCommon(backend, bounds.tp, bounds.dtype, bool(known), timeout)
            raise typer.Exit(run_layers(layer or [], of_trial, of_layers, limits, json_))
        raise typer.Exit(run_family(family, bounds, common, limits, json_, known=known is not False))


def _require_valid(family: str | None, layers: bool, layer: Sequence[str] | None, trial: str | None) -> None:
    if layers == (family is not None):
        raise UsageError("family", family or "", "either a model type of transformers or --layers")
    if not layers and (layer or trial):
        raise UsageError("layer" if layer else "trial", layer or trial, "--layers, which this option needs")
    if is_launched():
        raise UsageError("launcher", "torchrun or srun", "no launcher: each example has a small world of its own")
