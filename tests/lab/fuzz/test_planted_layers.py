"""Styles and layers of each backend pass as they are, and a mistake that is planted in one is found in its tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck import Rank, Topology, World
from tpcheck.backends.interface import LayerTable, ParallelLayer
from tpcheck.backends.registry import load_backend, modules_of
from tpcheck.lab.fuzz.layer_trial import RankTrial, layer_table, try_layer
from tpcheck.lab.fuzz.layers import LayerCommon, Worlds
from tpcheck.lab.fuzz.results import INPUT_GRADIENT, OUTPUT, Outcome, Trial

BACKENDS = ("deepspeed", "dtensor", "megatron", "transformers")
IMPORTED = [f"{module}.layer_table" for backend in BACKENDS for module in modules_of(backend)]
Plant = Callable[[nn.Module], None]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tpcheck.spawn(Topology(tp=2), timeout=300, also=IMPORTED) as world:
        yield world


class Planted:
    """A backend of which one layer has a mistake."""

    def __init__(self, backend: str, layer: str, plant: Plant, *, drops_reduction: bool = False) -> None:
        self.name = backend
        self._layer, self._plant, self._drops_reduction = layer, plant, drops_reduction

    def versions(self) -> dict[str, str]:
        return dict(load_backend(self.name).versions())

    def layer_table(self) -> LayerTable:
        table: LayerTable = layer_table(self.name)
        return replace(table, layers=[self._planted(layer) for layer in table.layers])

    def _planted(self, layer: ParallelLayer) -> ParallelLayer:
        if layer.name != self._layer:
            return layer

        def shard(module: nn.Module, rank: Any) -> nn.Module:
            assert layer.shard is not None
            sharded = layer.shard(module, rank)
            self._plant(sharded)
            return sharded

        return replace(layer, shard=shard, **({"reduce_gradients": None} if self._drops_reduction else {}))


def tried(rank: Rank, backend: Any, trial: Trial) -> RankTrial:
    return try_layer(rank, backend, trial)


def outcome(world: World, backend: Any, trial: Trial) -> Outcome:
    return Worlds(LayerCommon(backend, tp=(2,)), {}).judge(trial, world.run(tried, backend, trial))


def nothing(module: nn.Module) -> None:
    del module


def without_style(name: str) -> Plant:
    """Return a function that gives a module inside its own forward pass back, without the style's collectives."""

    def plant(module: nn.Module) -> None:
        layer = module.get_submodule(name)
        layer.forward = type(layer).forward.__get__(layer)

    return plant


def scales_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 2 * output)


def lets_gradients_of_inputs_alone(module: nn.Module) -> None:
    """Give back each rank's term of the input's gradient."""
    original = module.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = original(hidden.detach()) + 0 * hidden.sum()
        return output

    module.forward = forward


def adds_bias_on_every_rank(module: nn.Module) -> None:
    original: Any = module.layer.forward  # type: ignore[union-attr]
    module.layer.forward = lambda hidden: tuple(2 * part if part is not None else part for part in original(hidden))


ROWS = (2, 3)
CASES = [
    ("deepspeed", Trial("LmHeadLinearAllreduce", inputs=4, outputs=3, rows=ROWS, bias=True), scales_output, OUTPUT),
    ("deepspeed", Trial("Yuan_LinearLayer", outputs=2, inputs=3), lets_gradients_of_inputs_alone, INPUT_GRADIENT),
    ("deepspeed", Trial("Yuan_LinearAllreduce", outputs=2, inputs=2), scales_output, OUTPUT),
    ("transformers", Trial("mla_kv_a_proj", inputs=3), without_style("kv_a_proj_with_mqa"), INPUT_GRADIENT),
    (
        "transformers",
        Trial("replicated_with_grad_allreduce", inputs=3),
        without_style("q_norm"),
        "gradient of q_norm.weight",
    ),
    (
        "transformers",
        Trial("moe_identity_expert", inputs=3, rows=(4,)),
        without_style("experts.identity_expert"),
        OUTPUT,
    ),
    ("transformers", Trial("sequence_parallel", inputs=3, rows=ROWS), scales_output, OUTPUT),
    ("transformers", Trial("ep_dispatch_experts", inputs=3, rows=(4,)), scales_output, OUTPUT),
    ("dtensor", Trial("SequenceParallel of LayerNorm", inputs=3, rows=ROWS, bias=True), scales_output, OUTPUT),
    (
        "dtensor",
        Trial("PrepareModuleInput", inputs=4, outputs=4, rows=ROWS),
        scales_output,
        OUTPUT,
    ),
    ("dtensor", Trial("loss_parallel", inputs=3, outputs=4, rows=ROWS), scales_output, OUTPUT),
    (
        "megatron",
        Trial("ColumnParallelLinear, sequence_parallel", inputs=3, outputs=4, rows=ROWS),
        lets_gradients_of_inputs_alone,
        INPUT_GRADIENT,
    ),
    (
        "megatron",
        Trial("RowParallelLinear, skip_bias_add", inputs=4, outputs=3, rows=ROWS, bias=True),
        adds_bias_on_every_rank,
        OUTPUT,
    ),
    ("megatron", Trial("VocabParallelEmbedding", inputs=4, outputs=3, rows=ROWS), scales_output, OUTPUT),
]


@pytest.mark.parametrize(("backend", "trial", "plant", "tensor"), CASES, ids=[f"{c[0]}-{c[1].layer}" for c in CASES])
def test_a_layer_passes_and_a_mistake_in_it_is_found(
    world: World, backend: str, trial: Trial, plant: Plant, tensor: str
) -> None:
    assert outcome(world, backend, trial).status == "passed"
    planted = outcome(world, Planted(backend, trial.layer, plant), trial)
    assert (planted.status, planted.data["tensor"]) == ("failed", tensor)


def test_the_bias_under_sequence_parallelism_needs_the_reduction_after_the_step(world: World) -> None:
    trial = Trial("RowParallelLinear, sequence_parallel", inputs=4, outputs=3, rows=ROWS, bias=True)
    assert outcome(world, "megatron", trial).status == "passed"
    planted = outcome(world, Planted("megatron", trial.layer, nothing, drops_reduction=True), trial)
    assert (planted.status, planted.data["tensor"]) == ("failed", "gradient of bias")
    assert planted.data["cause"] == "partial_gradient_on_replica"


def test_a_bias_beside_a_frozen_weight_gets_no_gradient_of_megatron(world: World) -> None:
    trial = Trial("ColumnParallelLinear, frozen weight", inputs=3, outputs=4, rows=ROWS)
    assert outcome(world, "megatron", trial).status == "passed"
    lost = outcome(world, "megatron", replace(trial, bias=True))
    assert (lost.status, lost.data["tensor"]) == ("failed", "gradient of bias")


def test_label_smoothing_over_one_part_of_the_vocabulary_is_found(world: World) -> None:
    trial = Trial("vocab_parallel_cross_entropy", inputs=3, outputs=4, rows=ROWS)
    assert outcome(world, "megatron", trial).status == "passed"
    smoothed = outcome(world, "megatron", replace(trial, layer=f"{trial.layer}, label_smoothing"))
    assert (smoothed.status, smoothed.data["tensor"]) == ("failed", OUTPUT)
