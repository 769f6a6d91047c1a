"""At a low precision, modules are held against the reference one by one, where a whole pass drowns in rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tpcheck
from tests.model.planting import faulty
from tpcheck import Topology
from tpcheck.model.teacher_forcing import Parts, terms_among
from tpcheck.numerics.evidence import TensorKey

_LAYERS = 8
_WRONG = f"model.layers.{_LAYERS - 1}.self_attn.o_proj"
_GRADIENT = TensorKey("backward", "model", 0, "output", "0")


def a_little_too_large(candidate: Any, rank: Any) -> None:
    candidate.module.get_submodule(_WRONG).register_forward_hook(lambda module, args, output: output * 1.12)


def test_a_small_error_deep_in_a_model_is_found_where_it_is_made() -> None:
    report = tpcheck.verify_family(
        "llama",
        topology=Topology(tp=2),
        backend=faulty(a_little_too_large),
        dtype="bfloat16",
        zero_stage=1,
        steps=1,
        settings={"num_hidden_layers": _LAYERS},
        timeout=120,
    )
    first = report.findings[0]
    assert first.where["module"] == _WRONG
    assert "each module fed the reference's inputs" in report.to_text()
    others = {check.check: check.worst_margin for check in report.verdict.checks if check.check != first.check}
    assert max(others.values()) < 1  # the whole pass shows nothing


class _Scaled(torch.autograd.Function):
    """What leaves its input as it is, and sends back too much."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 1.12


def two_gradients_a_little_too_large(candidate: Any, rank: Any) -> None:
    attention = candidate.module.get_submodule("model.layers.5.self_attn.o_proj")
    attention.register_forward_pre_hook(lambda module, args: (_Scaled.apply(args[0]),))
    candidate.module.get_parameter("model.layers.0.self_attn.q_proj.weight").register_hook(lambda grad: grad * 1.1)


def test_small_errors_of_a_backward_pass_are_each_found_where_they_are_made() -> None:
    report = tpcheck.verify_family(
        "llama",
        topology=Topology(tp=2),
        backend=faulty(two_gradients_a_little_too_large),
        dtype="bfloat16",
        zero_stage=1,
        steps=1,
        settings={"num_hidden_layers": _LAYERS},
        timeout=120,
    )
    before, weight = report.findings  # what comes back from o_proj is too large before it reaches v_proj
    assert (before.where["module"], before.cause) == ("model.layers.5.self_attn", "gradient_scaled")
    assert weight.where["parameter"] == "model.layers.0.self_attn.q_proj.weight"
    assert weight.cause == "gradient_scaled"
    assert "each module fed the reference's inputs and output gradients" in report.to_text()


@pytest.mark.parametrize(("dtype", "reentrant"), [("float32", False), ("float32", True), ("float64", True)])
def test_what_checkpointing_computes_again_is_no_mistake(dtype: str, reentrant: bool) -> None:
    def checkpointed(candidate: Any, rank: Any) -> None:
        candidate.module.gradient_checkpointing_enable({"use_reentrant": reentrant})

    report = tpcheck.verify_family(
        "llama", topology=Topology(tp=2), backend=faulty(checkpointed), dtype=dtype, steps=1, timeout=120
    )
    assert report.passed, report
    assert report.verdict.coverage.compared > 0.9 * report.verdict.coverage.total


def test_terms_of_a_sum_are_told_from_rounding_in_some_features_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, share = torch.rand(5, 6, generator=generator), torch.rand(5, 2, generator=generator)
    noise = 1e-3 * torch.rand(5, 6, generator=generator)
    of_rank_0, of_rank_1 = whole.clone(), whole.clone()
    of_rank_0[:, 4:], of_rank_1[:, 4:] = share * whole[:, 4:], (1 - share) * whole[:, 4:]
    assert terms_among(({_GRADIENT: of_rank_0}, {_GRADIENT: of_rank_1}), {_GRADIENT: whole}) == {_GRADIENT}
    for parts in ((whole + noise, whole), (whole * 1.1, whole * 1.1), (of_rank_0, whole)):
        assert not terms_among([{_GRADIENT: part} for part in parts], {_GRADIENT: whole})


def test_a_module_keeps_what_no_part_can_stand_for() -> None:
    whole = torch.arange(12.0).reshape(2, 6)
    parts = Parts({_GRADIENT: whole}, tp=2, tp_rank=1)
    shard, close = whole[:, 3:], whole[:, 3:] * 1.01
    assert torch.equal(parts.instead_of(_GRADIENT, close), shard)
    others = (whole[:, :3], whole[:, 1:], torch.zeros(3))  # another rank's, an uneven one, something else
    assert all(parts.instead_of(_GRADIENT, other) is other for other in others)
    term = whole * 1.1
    assert Parts({_GRADIENT: whole}, terms={_GRADIENT}).instead_of(_GRADIENT, term) is term
    assert Parts({_GRADIENT: whole}, terms=None).instead_of(_GRADIENT, term) is term  # it may be one
