"""Facts of wrong gradients: collectives that autograd does not see, and what each use of a module adds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.numerics.evidence import BIAS, DOWN, NORM, UP, key, right_evidence, with_step
from tpcheck.core.placement import Replicate, Shard
from tpcheck.numerics.activation_placement import PlacedTensor
from tpcheck.numerics.checks.backward_facts import backward_facts, collectives_passed, gradients_of_uses
from tpcheck.numerics.checks.suspects import ComparedParameter
from tpcheck.numerics.differences import Difference
from tpcheck.numerics.evidence import Collective, Evidence, TensorKey

RIGHT = right_evidence()


def issued(*collectives: Collective, ranks: tuple[int, ...] = (0, 1)) -> Evidence:
    return with_step(RIGHT, ranks=ranks, collectives=collectives)


def unseen(module: str, **more: object) -> Collective:
    return replace(Collective(module, "all_reduce", (0, 1)), **{"bypasses_autograd": True, **more})  # type: ignore[arg-type]


INPUT, OUTPUT = key("block.down input", "backward"), key("block.down output", "backward")


def test_a_modules_own_collectives_count_on_every_rank_where_autograd_does_not_see_them() -> None:
    assert collectives_passed(issued(unseen("block.down")), 0, INPUT, unseen=True) == ("all_reduce",)
    assert collectives_passed(issued(unseen("block.down"), ranks=(0,)), 0, INPUT, unseen=True) == ()
    assert collectives_passed(issued(unseen("block.down", bypasses_autograd=False)), 0, INPUT, unseen=True) == ()
    assert collectives_passed(issued(unseen("block.down", bypasses_autograd=False)), 0, INPUT) == ("all_reduce",)
    assert collectives_passed(issued(unseen("block.up")), 0, INPUT, unseen=True) == ()
    assert collectives_passed(issued(unseen("block.down", phase="backward")), 0, INPUT, unseen=True) == ()


def test_what_stands_behind_a_module_counts_for_the_gradient_that_it_receives() -> None:
    activations = list(RIGHT.reference[0].activations)
    behind = unseen("block", position=activations.index(key("block.down output")) + 1)
    evidence = issued(behind)
    sources = {key("block output"): (key("block.down output"),)}
    evidence = replace(evidence, reference=(replace(evidence.reference[0], sources=sources),))
    assert collectives_passed(evidence, 0, OUTPUT, unseen=True) == ("all_reduce",)
    assert collectives_passed(evidence, 0, INPUT, unseen=True) == ()


def test_what_comes_back_through_each_module_that_takes_a_tensor_is_known() -> None:
    hidden, normed = key("block input", "backward"), key("block.norm input", "backward")
    sources = {key("block.norm input"): (key("block input"),)}
    step = replace(RIGHT.reference[0], sources=sources)
    doubled = replace(step, activations={**step.activations, hidden: 2 * step.activations[normed]})
    for reference, names in (
        (step, []),
        (doubled, ["input 0 of block.norm", "a path past block.norm, such as a residual"]),
    ):
        evidence = replace(RIGHT, reference=(reference,))
        parts = (reference.activations[hidden],) * 2
        branches = backward_facts(evidence, 0, hidden, PlacedTensor(Replicate(), parts)).branches
        assert list(branches) == names
        assert all(torch.equal(part, step.activations[normed]) for each in branches.values() for part in each)


def test_a_module_of_several_inputs_has_no_one_in_and_one_out_for_the_others() -> None:
    other = replace(key("block.norm input", "backward"), path="2")
    hidden = key("block.norm input", "backward")
    reference = replace(RIGHT.reference[0], activations={**RIGHT.reference[0].activations, other: torch.ones(2, 3, 2)})
    evidence = replace(issued(unseen("block.norm")), reference=(reference,))
    for gradient, is_known in ((hidden, True), (other, False)):
        placed = PlacedTensor(Replicate(), (reference.activations[gradient],) * 2)
        assert bool(backward_facts(evidence, 0, gradient, placed).inputs) is is_known


def test_sums_behind_what_a_module_returns_are_known_of_both_passes() -> None:
    activations = list(RIGHT.reference[0].activations)
    placed = PlacedTensor(Shard(2, sizes=((4, 4),)), (torch.zeros(2, 3, 4),) * 2)
    forward = Collective("block", "all_reduce", (0, 1), position=activations.index(key("block.down output")) + 1)
    backward = replace(forward, module="", phase="backward", position=activations.index(OUTPUT))
    sources = {key("block output"): (key("block.down output"),)}
    for collectives, ranks, expected in (
        ((forward, backward), (0, 1), (True, True)),
        ((forward,), (0, 1), (True, False)),
        ((backward,), (0, 1), (False, True)),
        ((forward, backward), (0,), (False, False)),
    ):
        evidence = issued(*collectives, ranks=ranks)
        evidence = replace(evidence, reference=(replace(evidence.reference[0], sources=sources),))
        steps = tuple(replace(step, logs_collectives=True) for step in evidence.candidate[0])
        facts = backward_facts(replace(evidence, candidate=(steps,)), 0, OUTPUT, placed)
        assert (bool(facts.collectives), facts.sums_backward) == expected


def with_logits(gradient: torch.Tensor, logits: torch.Tensor) -> Evidence:
    """Return evidence of a loss that issues an unseen collective, of logits whose halves the ranks have."""
    forward, backward = (TensorKey(phase, "loss", 0, "input", "0") for phase in ("forward", "backward"))  # type: ignore[arg-type]
    evidence = issued(unseen("loss"))
    step = replace(evidence.reference[0], activations={forward: logits, backward: gradient})
    return replace(evidence, reference=(step,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_part_of_a_cross_entropys_gradient_through_the_sum_is_known(smoothing: float) -> None:
    logits = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0, 5, -100], [1, 2, 6]])  # one position does not count
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=smoothing
    ).backward()
    assert logits.grad is not None
    evidence = with_logits(logits.grad, logits.detach())
    placed = PlacedTensor(Shard(2, sizes=((4, 4),)), logits.grad.chunk(2, dim=-1))
    facts = backward_facts(evidence, 0, TensorKey("backward", "loss", 0, "input", "0"), placed)
    expected = logits.detach().softmax(-1) / 5 * (labels >= 0)[..., None]
    torch.testing.assert_close(torch.cat(facts.through_sum, dim=-1), expected)


def test_another_gradient_has_no_such_part() -> None:
    logits = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    placed = PlacedTensor(Shard(2, sizes=((4, 4),)), logits.chunk(2, dim=-1))
    facts = backward_facts(with_logits(logits**3, logits), 0, TensorKey("backward", "loss", 0, "input", "0"), placed)
    assert (facts.collectives, facts.unseen) == (("all_reduce",),) * 2
    assert facts.through_sum == ()


def test_what_comes_back_besides_a_sum_is_known_where_autograd_sees_it_too() -> None:
    """A tensor that is detached before a right reduction sends nothing back through it."""
    logits = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = (logits.softmax(-1) - torch.nn.functional.one_hot(torch.tensor([[0, 5, 7], [1, 2, 6]]), 8)) / 6
    evidence = with_step(with_logits(gradient, logits), collectives=(unseen("loss", bypasses_autograd=False),))
    placed = PlacedTensor(Shard(2, sizes=((4, 4),)), gradient.chunk(2, dim=-1))
    facts = backward_facts(evidence, 0, TensorKey("backward", "loss", 0, "input", "0"), placed)
    assert (facts.collectives, facts.unseen) == (("all_reduce",), ())
    torch.testing.assert_close(torch.cat(facts.through_sum, dim=-1), logits.softmax(-1) / 6)
    silent = backward_facts(
        with_step(evidence, collectives=()), 0, TensorKey("backward", "loss", 0, "input", "0"), placed
    )
    assert silent.through_sum == ()


def used_twice(name: str) -> tuple[Evidence, ComparedParameter]:
    """Return evidence in which the module of a parameter is called a second time, with other tensors."""
    reference, module = RIGHT.reference[0], name.rpartition(".")[0]
    other = right_evidence(steps=2).reference[1]
    second = {replace(each, call=1): other.activations[each] for each in reference.activations if each.module == module}
    weight = RIGHT.initial[f"{module}.weight"]
    if module == "block.norm":  # computed with the weight of the first step
        hidden = other.activations[key("block.norm input")]
        second[replace(key("block.norm output"), call=1)] = hidden * weight
    gradient = reference.gradients[name] + contribution(other.activations, name)
    step = replace(
        reference, activations={**reference.activations, **second}, gradients={**reference.gradients, name: gradient}
    )
    difference = Difference(0.0, 1.0, 1e-12, (0.0, 0.0), 0.0, (), 0)
    parts = RIGHT.layouts[name].parts(gradient)
    return replace(RIGHT, reference=(step,)), ComparedParameter(name, gradient, parts, parts, difference)


def contribution(activations: dict[TensorKey, torch.Tensor], name: str) -> torch.Tensor:
    module = name.rpartition(".")[0]
    hidden, gradient = activations[key(f"{module} input")], activations[key(f"{module} output", "backward")]
    if name == BIAS:
        return gradient.sum(dim=(0, 1))
    if name == NORM:
        return (gradient * hidden).sum(dim=(0, 1))
    return gradient.flatten(0, 1).t() @ hidden.flatten(0, 1)


@pytest.mark.parametrize("name", [UP, DOWN, NORM, BIAS])
def test_what_each_use_adds_is_known(name: str) -> None:
    evidence, parameter = used_twice(name)
    uses = gradients_of_uses(evidence, 0, parameter)
    assert len(uses) == 2
    layout = RIGHT.layouts[name]
    for parts, expected in zip(uses[0], layout.parts(RIGHT.reference[0].gradients[name]), strict=True):
        torch.testing.assert_close(parts, expected)


def test_uses_that_do_not_add_up_and_those_over_dp_are_unknown() -> None:
    evidence, parameter = used_twice(UP)
    assert gradients_of_uses(evidence, 0, replace(parameter, expected=parameter.expected * 2)) == ()
    over_dp = replace(evidence, topology=right_evidence(dp=2).topology)
    assert gradients_of_uses(over_dp, 0, parameter) == ()
    assert gradients_of_uses(RIGHT, 0, parameter) == ()  # called once
