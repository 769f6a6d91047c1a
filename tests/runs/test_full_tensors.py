"""Whole tensors in two traces show causes that sketches cannot; without them, and of right runs, none is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tests.runs.attention_model import LENGTH, SAMPLES, VOCABULARY, Decoder
from tpcheck import Rank, Report, Topology

OUTPUTS, GRADIENTS, WEIGHTS = "outputs_match_reference", "gradients_match_reference", "weights_match_reference"
FAULTS: Mapping[str, tuple[str, str, str]] = {
    "vocab_offset": (OUTPUTS, "embedding", "vocab_offset_wrong"),
    "fused_contiguously": (OUTPUTS, "layers.1.down", "fused_blocks_interleaved"),
    "gathered_in_another_order": (OUTPUTS, "head", "shard_order_swapped"),
    "kv_heads_repeated_in_turn": (OUTPUTS, "layers.1.attention.o", "head_mapping_wrong"),
    "half_reduced": (OUTPUTS, "layers.1.down", "missing_reduce"),
    "bias_on_each_rank": (OUTPUTS, "layers.1.down", "bias_added_per_rank"),
    "transposed": (WEIGHTS, "layers.1.attention.q.weight", "transposed"),
    "another_layer": (WEIGHTS, "layers.1.attention.k.weight", "tensor_of_another_layer"),
    "another_boundary": (WEIGHTS, "layers.1.attention.v.weight", "wrong_shard_boundary"),
    "swapped_shards": (WEIGHTS, "layers.1.attention.v.weight", "shard_order_swapped"),
    "rounded": (WEIGHTS, "layers.1.attention.q.weight", "dtype_rounded"),
    "gradient_of_another_layer": (GRADIENTS, "layers.1.attention.v.weight", "tensor_of_another_layer"),
    "gradient_rounded": (GRADIENTS, "layers.1.attention.v.weight", "dtype_rounded"),
    "statistic_detached": (GRADIENTS, "layers.1.attention.q", "collective_without_backward"),
    "statistic_of_own_terms": (GRADIENTS, "layers.1.attention.q", "collective_without_backward"),
    "mixer_sums_without_backward": (GRADIENTS, "layers.1.down", "collective_without_backward"),
    "row_detached": (GRADIENTS, "layers.1.down.weight", "collective_without_backward"),
}
SHOWN_BY_SKETCHES = {"bias_on_each_rank", "mixer_sums_without_backward", "row_detached"}
SKETCHED = ("half_reduced", "swapped_shards", "statistic_detached", *sorted(SHOWN_BY_SKETCHES))
RIGHT = ""


def train(rank: Rank, folder: Path, options: Mapping[str, Any], faults: tuple[str, ...]) -> None:
    for fault in faults:
        model = Decoder(rank, (fault,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        path = folder / (fault or "right")
        with tpcheck.record(model, path, optimizer=optimizer, topology=rank.topology, **options):
            for part in tokens.chunk(rank.topology.dp * 2)[rank.dp_rank :: rank.topology.dp]:
                (model(part) / 2).backward()
            damage_gradients(model, fault if rank.topology.tp > 1 else "")
            optimizer.step()


def damage_gradients(model: Any, fault: str) -> None:
    first, second = (layer.attention.v.weight.grad for layer in model.layers)
    if fault == "gradient_of_another_layer":
        second.copy_(first)
    elif fault == "gradient_rounded":
        second.copy_(second.bfloat16())


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    with tpcheck.spawn(Topology(), timeout=60) as world:
        world.run(train, folder / "expected", {"replays": 2, "tensors": "full"}, (RIGHT,))
    with tpcheck.spawn(Topology(tp=2), timeout=60) as world:
        world.run(train, folder / "actual", {"tensors": "full"}, (RIGHT, *FAULTS))
        world.run(train, folder / "sketched", {}, (RIGHT, *SKETCHED))
    return folder


def compared(traces: Path, fault: str, how: str = "actual") -> Report:
    return tpcheck.compare_traces(traces / how / (fault or "right"), traces / "expected" / "right")


@pytest.mark.slow
def test_a_right_run_with_a_fused_layer_passes_and_says_what_was_compared_by_norm(traces: Path) -> None:
    for how in ("actual", "sketched"):
        report = compared(traces, RIGHT, how)
        assert report.passed, report.to_text()
        assert any("a fused layer" in reason for reason in report.verdict.coverage.not_compared.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_whole_tensors_show_the_cause(traces: Path, fault: str) -> None:
    check, place, cause = FAULTS[fault]
    report = compared(traces, fault)
    first = report.findings[0]
    found = (first.check, first.where.get("parameter") or first.where["module"], first.cause)
    assert found == (check, place, cause), report.to_text()


@pytest.mark.parametrize("fault", SKETCHED)
def test_sketches_find_the_same_place_and_print_what_to_record(traces: Path, fault: str) -> None:
    check, place, cause = FAULTS[fault]
    report = compared(traces, fault, "sketched")
    first = report.findings[0]
    assert (first.check, first.where.get("parameter") or first.where["module"]) == (check, place), report.to_text()
    assert first.cause == (cause if fault in SHOWN_BY_SKETCHES else None)
    advised = [finding for finding in report.findings if 'tensors="full"' in str(finding.evidence.get("note"))]
    assert advised == ([] if first.cause or check == WEIGHTS else [first])
