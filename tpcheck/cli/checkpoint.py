"""`tpcheck checkpoint ACTUAL REFERENCE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.options import writable
from tpcheck.cli.results import tell_one
from tpcheck.cli.terminal import BAD_USAGE, bytes_bar, usage_errors


def checkpoint(
    actual: Annotated[str, typer.Argument(help="The checkpoint in question: a file or a folder.")],
    reference: Annotated[str, typer.Argument(help="What it should be.")],
    dtype: Annotated[
        str | None, typer.Option(help="A cast that was meant: the reference is rounded to it, bfloat16 say.")
    ] = None,
    earlier: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A checkpoint of an earlier step; repeatable.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Unpickle any class, in a process of its own: runs what it says.")
    ] = False,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as JUnit XML.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every finding.")] = False,
) -> None:
    """Compare a checkpoint with a reference to the bit, and say what happened to each tensor that differs.

    Formats are recognised: safetensors, transformers' shards, pytorch_model.bin, torch DCP, DeepSpeed
    training and universal checkpoints, PEFT adapters, Megatron torch_dist. What TP or ZeRO ranks hold is
    put together first.

    \b
    tpcheck checkpoint saved/ reference/
    tpcheck checkpoint saved/global_step2 model.safetensors
    tpcheck checkpoint saved/ reference/ --dtype bfloat16 --json report.json

    Exit status: 0 they agree, 1 findings, 2 bad usage, a damaged file, or nothing that could be compared.
    """
    with usage_errors():
        json_, junit = writable("json", json_), writable("junit", junit)
        from tpcheck.checkpoints.verify import (
            verify_checkpoint,  # loads torch, which --help and bad usage need not wait for
        )

        with bytes_bar("compare") as progress:
            report = verify_checkpoint(
                actual, reference, dtype=dtype, earlier=earlier or (), allow_pickle=allow_pickle, progress=progress
            )
    told = tell_one(report, verbose=verbose, json_path=json_, junit_path=junit)
    status = {"passed": 0, "failed": 1}.get(report.verdict.verdict, BAD_USAGE)
    raise typer.Exit(status if told else BAD_USAGE)
