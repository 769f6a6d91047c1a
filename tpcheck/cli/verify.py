"""`tpcheck verify FAMILY...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.many import exit_status, run_all
from tpcheck.cli.options import json_object, settings, writable
from tpcheck.cli.progress import with_progress
from tpcheck.cli.results import tell
from tpcheck.cli.terminal import BAD_USAGE, speaks, usage_errors
from tpcheck.errors import UsageError
from tpcheck.report import Report
from tpcheck.topology import Topology
from tpcheck.world.attach import is_launched


def verify(
    families: Annotated[list[str], typer.Argument(metavar="FAMILY", help="Model types of transformers: llama, qwen3.")],
    backend: Annotated[str, typer.Option(help="What shards the model.")] = "deepspeed",
    tp: Annotated[int, typer.Option(help="Ranks of a tensor-parallel group.")] = 2,
    dp: Annotated[int, typer.Option(help="Data-parallel replicas.")] = 1,
    zero: Annotated[int, typer.Option(help="ZeRO stage of the backend, 0 to 3.")] = 0,
    dtype: Annotated[str, typer.Option(help="float64 tells bugs from rounding best.")] = "float64",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2,
    jobs: Annotated[int, typer.Option(help="Families side by side, each in a world of its own.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the model's configuration; repeatable."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="JSON|FILE", help="Backend configuration, merged over tpcheck's.")
    ] = None,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="Drop the model's own tp_plan: the backend's heuristics shard it.")
    ] = False,
    checks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run this check alone; repeatable. Without it, all but the saved model's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and replays.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds until a run that hangs is ended.")] = 600,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as JUnit XML.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every finding, and the checks that passed.")] = False,
) -> None:
    """Shard a small model, train it beside the unsharded one, and say where they differ.

    \b
    tpcheck verify llama --tp 2
    tpcheck verify llama qwen3 opt --tp 2 --dp 2 --zero 1 --jobs 2 --json report.json
    tpcheck verify phi --set qk_layernorm=true
    tpcheck verify llama --checks checkpoint_matches_reference
    tpcheck verify bloom --config '{"tensor_parallel": {"preset_model": "bloom"}}'

    Exit status: 0 passed, 1 findings, 2 bad usage or a report that cannot be written, 3 the system
    under test crashed. Of several families the first that applies of 2, 1, 3 counts.
    """
    with usage_errors():
        topology = Topology(tp=tp, dp=dp)
        if jobs < 1:
            raise UsageError("jobs", jobs, "a positive integer")
        changes = settings(set_ or [])
        backend_config = json_object("config", config) if config is not None else None
        json_, junit = writable("json", json_), writable("junit", junit)

    def verify_one(family: str) -> Report:
        from tpcheck.api import verify_family  # loads torch, which --help and bad usage need not wait for

        return verify_family(
            family,
            topology=topology,
            backend=backend,
            dtype=dtype,
            steps=steps,
            zero_stage=zero,
            config=backend_config,
            checks=checks or None,
            seed=seed,
            settings=changes,
            ignore_plan=ignore_plan,
            timeout=timeout,
        )

    running = run_all(families, verify_one, 1 if is_launched() else jobs)  # a launcher started one world
    outcomes = list(with_progress(running, families) if len(families) > 1 and speaks() else running)
    outcomes.sort(key=lambda outcome: families.index(outcome.family))
    told = not speaks() or tell(outcomes, verbose=verbose, json_path=json_, junit_path=junit)
    raise typer.Exit(exit_status(outcomes) if told else BAD_USAGE)
