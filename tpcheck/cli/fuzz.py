"""`tpcheck fuzz FAMILY` and `tpcheck fuzz --layers`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.fuzz_runs import LayersWanted, run_family, run_layers
from tpcheck.cli.options import integers, json_object, names, settings, writable
from tpcheck.cli.terminal import usage_errors
from tpcheck.errors import UsageError
from tpcheck.world.attach import is_launched


def fuzz(
    family: Annotated[
        str | None, typer.Argument(metavar="[FAMILY]", help="A model type of transformers: llama, qwen3, t5.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Try the backend's layers one by one, in place of a family.")
    ] = False,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --layers, try these alone; repeatable.")
    ] = None,
    trial: Annotated[str | None, typer.Option(metavar="JSON", help="With --layers, repeat this one try.")] = None,
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
        bool | None,
        typer.Option(
            "--known/--no-known",
            help="Whether a registered upstream bug is no finding. By default so for a family, and not for layers.",
            show_default=False,
        ),
    ] = None,
    shrink_seconds: Annotated[float, typer.Option(help="How long a failure may be shrunk.")] = 300,
    timeout: Annotated[float, typer.Option(help="Seconds until an example that hangs is ended.")] = 120,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the search as JSON.")] = None,
) -> None:
    """Draw configurations of a family (or of single layers), verify each, and shrink what fails.

    Drawn are: the sizes of tp and dp, the ZeRO stage, the dtype, widths, heads and heads of keys that need not
    be even, layers, vocabulary, every switch of the family's own configuration (biases, tied embeddings),
    options of the backend that must not matter (overlapped communication, bucket sizes, clipping), and the
    batch: how many samples and tokens, with or without padding, contiguous in memory or not.

    \b
    tpcheck fuzz llama
    tpcheck fuzz qwen3 --examples 50 --tp 2 --dp 1 --zero 0 --dtype float64
    tpcheck fuzz phi --set qk_layernorm=false --json phi.json

    With --layers every tensor-parallel layer of the backend is tried by itself beside the layer that it replaces:
    outputs and the gradients of input, weight and bias, with widths that need not be even and tensors that lie
    otherwise in memory (transposed, sliced, expanded), as inputs and as gradients. Each has --examples of its own.

    \b
    tpcheck fuzz --layers
    tpcheck fuzz --layers --backend transformers --layer colwise --layer rowwise --known
    tpcheck fuzz --layers --trial '{"layer": "LinearLayer", "inputs": 2, "rows": [2], "strides": "transposed"}'

    What fails is told with the command that repeats it, and what that was shrunk from. A configuration that the
    model or the backend refuses in so many words is counted and no finding; a crash is one.

    Exit status: 0 nothing was found, 1 findings, 2 bad usage or nothing could be run, 3 the system under test
    crashed, 130 interrupted.
    """
    with usage_errors():
        _require_valid(examples, family, layers, layer, trial)
        json_ = writable("json", json_)
        fixed, configuration = settings(set_ or []), json_object("config", config) if config is not None else {}
        sizes = {"tp": integers("tp", tp), "dp": integers("dp", dp), "zero": integers("zero", zero)}

        from tpcheck.api.fuzz import Bounds, Common, Limits  # loads torch, which --help need not wait for

        bounds = Bounds.of(dtype=names("dtype", dtype), **sizes)
        limits = Limits(examples, seed, shrink_seconds)
        if family is None:
            wanted = LayersWanted(backend, layer or [], trial, known=bool(known), timeout=timeout)
            raise typer.Exit(run_layers(wanted, bounds, limits, json_))
        common = Common(backend, steps, 0, fixed, configuration, ignore_plan, timeout, known is not False)
        raise typer.Exit(run_family(family, bounds, common, limits, json_))


def _require_valid(
    examples: int, family: str | None, layers: bool, layer: Sequence[str] | None, trial: str | None
) -> None:
    if examples < 1:
        raise UsageError("examples", examples, "a positive integer")
    if layers == (family is not None):
        raise UsageError("family", family or "", "either a model type of transformers or --layers")
    if not layers and (layer or trial):
        raise UsageError("layer" if layer else "trial", layer or trial, "--layers beside it")
    if is_launched():
        raise UsageError("launcher", "torchrun or srun", "no launcher: each example has a small world of its own")
