"""Mistakes behind a mistake are found: leaf modules of the reference are recomputed on the ranks' wrong inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import tpcheck
from tpcheck import Topology
from tpcheck.core.placement import Shard
from tpcheck.lab.faults.fault import FaultyBackend, Live
from tpcheck.model.recompute import compute_alone, recompute_outputs
from tpcheck.numerics.evidence import Evidence, Step, TensorKey
from tpcheck.numerics.tolerance import Tolerance

INPUT, OUTPUT = (TensorKey("forward", "norm", 0, role, "0") for role in ("input", "output"))
TOKENS = torch.arange(8.0, dtype=torch.float64).reshape(2, 4).sin()
WRONG = TOKENS + 0.5


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.double()


def recomputed(
    norm: nn.Module, inputs: list[torch.Tensor], outputs: list[torch.Tensor] | None = None, **more: Any
) -> dict[TensorKey, tuple[torch.Tensor, ...]]:
    """Recompute a model of one module whose input on each rank is given; the reference's is `TOKENS`."""
    return recompute_outputs(*of_module(norm, inputs, outputs, **more))


def computed_alone(norm: nn.Module, *args: Any, **more: Any) -> dict[TensorKey, tuple[torch.Tensor, ...]]:
    return compute_alone(*of_module(norm, *args, **more))


def of_module(
    norm: nn.Module, inputs: list[torch.Tensor], outputs: list[torch.Tensor] | None = None, **more: Any
) -> tuple[nn.Module, dict[str, torch.Tensor], Evidence]:
    model = Model(norm)
    state = dict(model.state_dict())
    activations = {INPUT: TOKENS, OUTPUT: norm(TOKENS).detach(), **more.get("reference", {})}
    parts = outputs or [norm(part).detach() for part in inputs]
    evidence = Evidence(
        topology=Topology(tp=len(inputs)),
        dp_rank=0,
        dtype="float64",
        initial={},
        initial_parts=tuple(more.get("parts", [{}] * len(inputs))),
        layouts=more.get("layouts", {}),
        reference=(Step(activations, {}, {}, None, 0.0),),
        candidate=(tuple(Step({INPUT: i, OUTPUT: o}, {}, {}, None, 0.0) for i, o in zip(inputs, parts, strict=True)),),
        buffers=(),
        facts=(),
        tolerance=Tolerance(0.0, 1, {}),
    )
    return model, state, evidence


def test_a_module_is_recomputed_on_each_ranks_wrong_input() -> None:
    norm = nn.LayerNorm(4).double()
    (outputs,) = recomputed(norm, [TOKENS, WRONG * 2]).values()
    assert torch.equal(outputs[0], norm(TOKENS))
    assert torch.equal(outputs[1], norm(WRONG * 2))


def test_a_module_with_right_inputs_is_not_recomputed() -> None:
    assert not recomputed(nn.LayerNorm(4), [TOKENS, TOKENS])


def test_an_elementwise_module_is_recomputed_on_shards() -> None:
    (outputs,) = recomputed(nn.SiLU(), [WRONG[:, :2], WRONG[:, 2:]]).values()
    assert torch.equal(torch.cat(outputs, dim=1), functional.silu(WRONG))


HALVES = [WRONG[:, :2], WRONG[:, 2:]]


def test_a_module_that_needs_the_whole_input_is_recomputed_on_the_shards_put_together() -> None:
    (outputs,) = recomputed(nn.Softmax(dim=-1), HALVES).values()
    assert torch.equal(torch.cat(outputs, dim=1), WRONG.softmax(dim=-1))
    (outputs,) = recomputed(nn.LayerNorm(4), HALVES, HALVES).values()
    assert torch.equal(torch.cat(outputs, dim=1), functional.layer_norm(WRONG, (4,)))


def test_shards_whose_order_is_unknown_are_not_put_together() -> None:
    fused = SimpleNamespace(is_replicated=False, placement=lambda: Shard(0, sizes=((1, 1), (1, 1))))
    assert not recomputed(nn.LayerNorm(4), HALVES, HALVES, layouts={"norm.weight": fused})


def test_each_rank_alone_computes_on_its_input_with_its_part_of_the_parameters() -> None:
    norm = nn.LayerNorm(4).double()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    norm.weight.data.copy_(weight)
    parts = [{"norm.weight": part, "norm.bias": torch.zeros(2, dtype=torch.float64)} for part in weight.chunk(2)]
    (alone,) = computed_alone(norm, HALVES, HALVES, parts=parts).values()
    for output, half, part in zip(alone, HALVES, weight.chunk(2), strict=True):
        assert torch.equal(output, functional.layer_norm(half, (2,)) * part)


def test_what_agrees_and_what_does_not_run_on_a_part_is_not_computed_alone() -> None:
    right = nn.SiLU()(TOKENS)
    assert not computed_alone(nn.SiLU(), [TOKENS[:, :2], TOKENS[:, 2:]], [right[:, :2], right[:, 2:]])
    assert not computed_alone(nn.Linear(4, 4), HALVES, HALVES)
    assert not computed_alone(nn.Sequential(nn.SiLU()), HALVES, HALVES)  # whose input is wrong, too


def test_a_module_around_others_is_computed_alone_where_its_input_agrees() -> None:
    halves = list(TOKENS.chunk(2, dim=1))
    (alone,) = computed_alone(nn.Sequential(nn.Softmax(dim=-1)), halves, halves).values()
    assert all(map(torch.equal, alone, [half.softmax(dim=-1) for half in halves]))


def test_a_module_with_a_sharded_parameter_is_not_recomputed() -> None:
    sharded = {"norm.weight": SimpleNamespace(is_replicated=False)}
    assert not recomputed(nn.LayerNorm(4), [WRONG, WRONG], layouts=sharded)
    replicated = {"norm.weight": SimpleNamespace(is_replicated=True)}
    assert recomputed(nn.LayerNorm(4), [WRONG, WRONG], layouts=replicated)


def test_a_module_with_a_second_input_is_not_recomputed() -> None:
    second = {TensorKey("forward", "norm", 0, "input", "1"): TOKENS}
    assert not recomputed(nn.LayerNorm(4), [WRONG, WRONG], reference=second)


def test_a_module_with_submodules_is_not_recomputed() -> None:
    assert not recomputed(nn.Sequential(nn.SiLU()), [WRONG, WRONG])


ROW, NORM = "model.layers.0.self_attn.o_proj", "model.layers.1.post_attention_layernorm"
COLUMN, WEIGHT = "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj.weight"


def inject_four_mistakes(live: Live) -> None:
    row, column = live.module(ROW), live.module(COLUMN)
    row.forward = lambda hidden: functional.linear(hidden, row.weight)
    column.forward = lambda hidden: functional.linear(hidden, column.weight)  # its input gradient is not reduced
    if live.rank.rank == 1:
        live.module(NORM).variance_epsilon *= 100
    live.parameter(WEIGHT).register_hook(lambda gradient: gradient * 2)


def test_four_mistakes_in_one_model_are_four_findings() -> None:
    report = tpcheck.verify_family(
        "llama",
        topology=Topology(tp=2),
        backend=FaultyBackend(inject_four_mistakes),
        steps=1,
        replays=4,
        timeout=120,
    )
    found = {
        (finding.check, finding.where.get("parameter") or finding.where["module"], finding.cause)
        for finding in report.findings
        if finding.check in ("outputs_match_reference", "gradients_match_reference")
    }
    assert found == {
        ("outputs_match_reference", ROW, "missing_reduce"),
        ("outputs_match_reference", NORM, None),
        ("gradients_match_reference", COLUMN, "missing_reduce"),
        ("gradients_match_reference", WEIGHT, "gradient_scaled"),
    }
    assert "compared with the output recomputed from its inputs and weights" in report.to_text()
