"""`tpcheck fuzz FAMILY`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.fuzz_progress import telling
from tpcheck.cli.options import integers, json_object, names, settings, writable
from tpcheck.cli.results import all_written
from tpcheck.cli.terminal import BAD_USAGE, show, usage_errors, write_whole
from tpcheck.errors import UsageError
from tpcheck.records.fuzzed import Searched
from tpcheck.report.fuzz import searched_json, searched_lines
from tpcheck.world.attach import is_launched

INTERRUPTED = 130  # what shells say of a command that Ctrl-C ended
_STATUS = {"passed": 0, "failed": 1, "skipped": BAD_USAGE, "error": 3}


def fuzz(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A model type of transformers: llama, qwen3, t5.")],
    backend: Annotated[str, typer.Option(metavar="NAME", help="What shards the model.")] = "deepspeed",
    examples: Annotated[int, typer.Option(help="Configurations to run; what is refused does not count.")] = 200,
    seed: Annotated[int, typer.Option(help="Equal seeds draw equal configurations.")] = 0,
    tp: Annotated[str, typer.Option(metavar="N[,..]", help="Draw from these; a failure shrinks to the first.")] = "2,4",
    dp: Annotated[str, typer.Option(metavar="N[,..]", help="Draw from these data-parallel sizes.")] = "1,2",
    zero: Annotated[
        str, typer.Option(metavar="N[,..]", help="Draw from those of these ZeRO stages that the backend has.")
    ] = "0,1,2,3",
    dtype: Annotated[
        str, typer.Option(metavar="NAME[,..]", help="Draw from these; float64 tells bugs from rounding best.")
    ] = "float64,float32,bfloat16",
    steps: Annotated[int, typer.Option(help="Training steps of each example.")] = 2,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Fix a setting of the model; repeatable. The others are drawn."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="JSON|FILE", help="Backend configuration of every example.")
    ] = None,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="Drop the model's own tp_plan: the backend's heuristics shard it.")
    ] = False,
    known: Annotated[
        bool, typer.Option("--known/--no-known", help="Whether a registered upstream bug is no finding.")
    ] = True,
    shrink_seconds: Annotated[float, typer.Option(help="How long a failure may be shrunk.")] = 300,
    timeout: Annotated[float, typer.Option(help="Seconds until an example that hangs is ended.")] = 120,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the search as JSON.")] = None,
) -> None:
    """Draw configurations of a family, verify each, and shrink what fails to the smallest that does.

    Drawn are: the sizes of tp and dp, the ZeRO stage, the dtype, widths, heads and heads of keys that need not
    be even, layers, vocabulary, every switch of the family's own configuration (biases, tied embeddings),
    options of the backend that must not matter (overlapped communication, bucket sizes, clipping), and the
    batch: how many samples and tokens, with or without padding, contiguous in memory or not.

    \b
    tpcheck fuzz llama
    tpcheck fuzz qwen3 --examples 50 --tp 2 --dp 1 --zero 0 --dtype float64
    tpcheck fuzz phi --set qk_layernorm=false --json phi.json

    What fails is told with the command that repeats it, and what that was shrunk from. A configuration that the
    model or the backend refuses in so many words is counted and no finding; a crash is one.

    Exit status: 0 nothing was found, 1 findings, 2 bad usage or nothing could be run, 3 the system under test
    crashed, 130 interrupted.
    """
    with usage_errors():
        if examples < 1:
            raise UsageError("examples", examples, "a positive integer")
        if is_launched():
            raise UsageError("launcher", "torchrun or srun", "no launcher: each example has a small world of its own")
        json_ = writable("json", json_)
        fixed, configuration = settings(set_ or []), json_object("config", config) if config is not None else {}
        sizes = {"tp": integers("tp", tp), "dp": integers("dp", dp), "zero": integers("zero", zero)}
        dtypes = names("dtype", dtype)

        from tpcheck.api.fuzz import Bounds, Common, Limits, fuzz_family  # loads torch, which --help need not wait for

        bounds = Bounds.of(dtype=dtypes, **sizes)
        common = Common(backend, steps, 0, fixed, configuration, ignore_plan, timeout, known)
        with telling(examples) as told:
            searched = fuzz_family(family, bounds, common, Limits(examples, seed, shrink_seconds), told)
    raise typer.Exit(_told(searched, json_))


def _told(searched: Searched, json_path: Path | None) -> int:
    writes = [lambda: show(searched_lines(searched))]
    if json_path:
        writes.append(lambda: write_whole(json_path, searched_json(searched)))
    if not all_written(writes):
        return BAD_USAGE
    status = _STATUS[searched.verdict]
    return INTERRUPTED if searched.interrupted and status in (0, BAD_USAGE) else status
