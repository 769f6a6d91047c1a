"""Teacher forcing per module: at a low precision an error is found in its module, where a whole pass hides it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tpcheck
from tpcheck import Topology
from tpcheck.lab.faults.fault import FaultyBackend, Live
from tpcheck.model.teacher_forcing import Gradients, ReferenceParts, find_partial_gradients, inner_backward
from tpcheck.numerics.evidence import TensorKey

GRADIENT = TensorKey("backward", "model", 0, "output", "0")
WHOLE = torch.arange(12.0).reshape(2, 6)


def test_a_rank_is_given_its_shard_of_the_reference() -> None:
    parts = ReferenceParts({GRADIENT: WHOLE}, tp=2, tp_rank=1)
    assert torch.equal(parts.forced_value(GRADIENT, WHOLE[:, 3:] * 1.01), WHOLE[:, 3:])
    assert torch.equal(parts.forced_value(GRADIENT, WHOLE * 1.01), WHOLE)


@pytest.mark.parametrize(
    "actual", [WHOLE[:, :3], WHOLE[:, 1:], torch.zeros(3)], ids=["of another rank", "uneven", "another shape"]
)
def test_a_module_keeps_what_is_not_close_to_its_part(actual: torch.Tensor) -> None:
    assert ReferenceParts({GRADIENT: WHOLE}, tp=2, tp_rank=1).forced_value(GRADIENT, actual) is actual


@pytest.mark.parametrize("partial_gradients", [{GRADIENT}, None])
def test_a_module_keeps_a_gradient_that_is_or_may_be_partial(partial_gradients: set[TensorKey] | None) -> None:
    term = WHOLE * 1.1
    parts = ReferenceParts({GRADIENT: WHOLE}, partial_gradients=partial_gradients)
    assert parts.forced_value(GRADIENT, term) is term
    assert ReferenceParts({GRADIENT: WHOLE}).forced_value(GRADIENT, term) is not term


def test_a_recomputed_call_is_given_the_tensors_of_the_only_call() -> None:
    recomputed = TensorKey("backward", "model", 1, "output", "0")
    parts = ReferenceParts({GRADIENT: WHOLE})
    assert torch.equal(parts.forced_value(recomputed, WHOLE * 1.01), WHOLE)


def test_a_gradient_is_partial_if_its_sum_is_right_and_the_terms_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, share = torch.rand(5, 6, generator=generator), torch.rand(5, 2, generator=generator)
    noise = 1e-3 * torch.rand(5, 6, generator=generator)
    term_0, term_1 = whole.clone(), whole.clone()  # terms in two features alone, as a fused projection has them
    term_0[:, 4:], term_1[:, 4:] = share * whole[:, 4:], (1 - share) * whole[:, 4:]
    assert find_partial_gradients(({GRADIENT: term_0}, {GRADIENT: term_1}), {GRADIENT: whole}) == {GRADIENT}
    for parts in ((whole + noise, whole), (whole * 1.1, whole * 1.1), (term_0, whole)):
        assert not find_partial_gradients([{GRADIENT: part} for part in parts], {GRADIENT: whole})
    assert not find_partial_gradients([{GRADIENT: term_0}, {}], {GRADIENT: whole})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.first(hidden)
        return hidden + inner


def test_an_inner_backward_pass_leaves_no_trace_outside() -> None:
    model, seen = Block(), []
    hidden = torch.ones(2, 3, requires_grad=True)
    received: list[Gradients] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    with inner_backward(model, lambda output: output.sum(), received.append):
        assert not model(hidden).grad_fn
    assert [set(gradients) for gradients in received] == [{"first.weight", "first.bias"}]
    assert not seen
    assert all(tensor.grad is None for tensor in (hidden, *model.parameters()))
    assert torch.is_grad_enabled()


class Reversible(torch.autograd.Function):
    """Runs another backward pass inside the backward pass, as Reformer's layers do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.hidden = layer, hidden.detach()
        output: torch.Tensor = layer(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(ctx.hidden), grads[0])
        return None, grads[0]


@pytest.mark.parametrize("loss", ["none", "recomputed", "reversible"])
def test_there_are_no_gradients_without_a_loss_or_where_they_would_be_accumulated(loss: str) -> None:
    model = Block()

    def loss_of(output: torch.Tensor) -> torch.Tensor | None:
        if loss == "none":
            return None
        if loss == "reversible":
            reversible: torch.Tensor = Reversible.apply(model.first, output)  # type: ignore[no-untyped-call]
            return reversible.sum()
        recomputed: torch.Tensor = checkpoint(model.first, output, use_reentrant=True)
        return recomputed.sum()

    received: list[Gradients] = []
    with inner_backward(model, loss_of, received.append):
        model(torch.ones(2, 3))
    assert not received
    assert all(parameter.grad is None for parameter in model.parameters())


LAYERS = 8
WRONG = f"model.layers.{LAYERS - 1}.self_attn.o_proj"


def scale_an_output(live: Live) -> None:
    live.module(WRONG).register_forward_hook(lambda module, args, output: output * 1.12)


def verify_in_bfloat16(inject: Any) -> tpcheck.Report:
    return tpcheck.verify_family(
        "llama",
        topology=Topology(tp=2),
        backend=FaultyBackend(inject),
        dtype="bfloat16",
        zero_stage=1,
        steps=1,
        replays=4,
        settings={"num_hidden_layers": LAYERS},
        timeout=120,
    )


def test_a_small_error_deep_in_a_model_is_found_in_its_module() -> None:
    report = verify_in_bfloat16(scale_an_output)
    first = report.findings[0]
    assert first.where["module"] == WRONG
    assert "each module given the reference's inputs" in report.to_text()
    others = {check.check: check.worst_margin for check in report.verdict.checks if check.check != first.check}
    assert max(others.values()) < 1  # the whole pass shows nothing


class Scaled(torch.autograd.Function):
    """Returns its input, and sends back a gradient that is too large."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 1.12


def scale_two_gradients(live: Live) -> None:
    attention = live.module("model.layers.5.self_attn.o_proj")
    attention.register_forward_pre_hook(lambda module, args: (Scaled.apply(args[0]),))
    live.parameter("model.layers.0.self_attn.q_proj.weight").register_hook(lambda gradient: gradient * 1.1)


def test_small_errors_of_a_backward_pass_are_each_found_in_their_module() -> None:
    report = verify_in_bfloat16(scale_two_gradients)
    before, weight = report.findings  # what comes back from o_proj is too large before it reaches v_proj
    assert (before.where["module"], before.cause) == ("model.layers.5.self_attn", "gradient_scaled")
    assert weight.where["parameter"] == "model.layers.0.self_attn.q_proj.weight"
    assert weight.cause == "gradient_scaled"
    assert "each module given the reference's inputs and output gradients" in report.to_text()


@pytest.mark.parametrize(("dtype", "reentrant"), [("float32", False), ("float32", True), ("float64", True)])
def test_recomputation_by_checkpointing_is_no_mistake(dtype: str, reentrant: bool) -> None:
    def checkpointed(live: Live) -> None:
        live.candidate.module.gradient_checkpointing_enable({"use_reentrant": reentrant})

    report = tpcheck.verify_family(
        "llama", topology=Topology(tp=2), backend=FaultyBackend(checkpointed), dtype=dtype, steps=1, timeout=120
    )
    assert report.passed, report
    assert report.verdict.coverage.compared > 0.9 * report.verdict.coverage.total
