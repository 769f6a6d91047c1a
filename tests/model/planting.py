"""Plants a fault in the live sharded model that DeepSpeed made, never in the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpcheck.lab.faults.fault import FaultyBackend

Plant = Callable[[Any, Any], None]  # candidate, rank


def faulty(plant: Plant) -> FaultyBackend:
    """Return DeepSpeed with a fault: `plant(candidate, rank)` is called on every rank once the model is sharded."""
    return FaultyBackend(lambda live: plant(live.candidate, live.rank))


def skips_its_reduce(candidate: Any, rank: Any) -> None:
    layer = candidate.module.get_submodule("model.layers.1.mlp.down_proj")
    layer.forward = lambda hidden: hidden @ layer.weight.t()


def reduces_twice(candidate: Any, rank: Any) -> None:
    layer = candidate.module.get_submodule("model.layers.0.self_attn.o_proj")
    once = layer.forward
    layer.forward = lambda hidden: once(hidden) * rank.topology.tp  # what a second all-reduce makes of replicas


def other_epsilon_on_rank_1(candidate: Any, rank: Any) -> None:
    if rank.rank == 1:
        candidate.module.get_submodule("model.norm").variance_epsilon *= 10


def shard_of_another_place(candidate: Any, rank: Any) -> None:
    weight = candidate.module.get_submodule("model.layers.0.mlp.up_proj").weight
    weight.data = weight.data.roll(1, dims=0)


def gradient_times_tp(candidate: Any, rank: Any) -> None:
    weight = candidate.module.get_submodule("model.layers.1.input_layernorm").weight
    weight.register_hook(lambda gradient: gradient * rank.topology.tp)


def partial_gradient(candidate: Any, rank: Any) -> None:
    weight = candidate.module.get_submodule("model.norm").weight
    weight.register_hook(lambda gradient: gradient * (0.25 if rank.tp_rank == 0 else 0.75))


def gradient_never_made(candidate: Any, rank: Any) -> None:
    candidate.module.get_submodule("model.layers.0.post_attention_layernorm").weight.requires_grad_(False)


def higher_learning_rate(candidate: Any, rank: Any) -> None:
    candidate._engine.optimizer.param_groups[0]["lr"] *= 1.0001


def drifts_on_rank_1(candidate: Any, rank: Any) -> None:
    weight = candidate.module.get_submodule("model.norm").weight
    step = candidate._engine.step

    def drifting() -> None:
        step()
        if rank.rank == 1:
            weight.data[3] *= 1 + 1e-15

    candidate._engine.step = drifting


def buffer_differs_on_rank_1(candidate: Any, rank: Any) -> None:
    if rank.rank == 1:
        candidate.module.get_submodule("model.rotary_emb").inv_freq.mul_(1 + 1e-12)


def buffer_moves_on_every_rank(candidate: Any, rank: Any) -> None:
    step = candidate._engine.step

    def moving() -> None:
        step()
        candidate.module.get_submodule("model.rotary_emb").original_inv_freq.mul_(1 + 1e-9)

    candidate._engine.step = moving


def tp_group_is_the_dp_group(candidate: Any, rank: Any) -> None:
    candidate.module.get_submodule("model.layers.0.mlp.down_proj").mp_group = rank.group("dp")


def norm_counts_replicas(candidate: Any, rank: Any) -> None:
    from deepspeed.runtime import utils

    utils.is_model_parallel_parameter = lambda parameter: True
