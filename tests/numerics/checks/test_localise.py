"""The first wrong module is the one whose inputs, and whatever happened inside it, agree."""

import pytest

from tpcheck.numerics.checks.activations import first_divergences, scope_of
from tpcheck.numerics.evidence import TensorKey

FORWARD = """
layers.0 in
layers.0.attn in
layers.0.attn.q in
layers.0.attn.q out
layers.0.attn.o in
layers.0.attn.o out
layers.0.attn out
layers.0.mlp in
layers.0.mlp out
layers.0 out
layers.1 in
layers.1.mlp in
layers.1.mlp out
layers.1 out
 out
""".strip("\n").splitlines()


def key(event: str, phase: str = "forward") -> TensorKey:
    module, role = event.rsplit(" ", 1)
    return TensorKey(phase, module, 0, {"in": "input", "out": "output"}[role], "0")


EVENTS = [key(event) for event in FORWARD]


@pytest.mark.parametrize(
    ("wrong", "roots", "scope"),
    [
        ([], [], None),
        (["layers.0.attn.o out", "layers.0.attn out", "layers.0 out"], ["layers.0.attn.o out"], "layers.0.attn.o"),
        (["layers.0.attn.o in", "layers.0.attn.o out", "layers.0.attn out"], ["layers.0.attn.o in"], "layers.0.attn"),
        (["layers.0.mlp out", "layers.0 out", "layers.1 in", "layers.1.mlp in", "layers.1 out", " out"],
         ["layers.0.mlp out"], "layers.0.mlp"),
        (["layers.0 out", "layers.1 in"], ["layers.0 out"], "layers.0"),
        (["layers.1 in"], ["layers.1 in"], ""),
    ],
)  # fmt: skip
def test_only_what_nothing_wrong_feeds_is_named(wrong: list[str], roots: list[str], scope: str | None) -> None:
    found = first_divergences(EVENTS, {key(event) for event in wrong}.__contains__)
    assert found == [key(event) for event in roots]
    if found:
        assert scope_of(found[0], {event.module for event in EVENTS}) == scope


def test_two_faults_in_separate_branches_are_both_named() -> None:
    wrong = {key("layers.0.attn.q out"), key("layers.0.mlp out")}
    assert first_divergences([event for event in EVENTS if event.module.startswith("layers.0.")], wrong.__contains__)
    inside = [event for event in EVENTS if event.module in ("layers.0.attn.q", "layers.0.mlp")]
    assert first_divergences(inside, wrong.__contains__) == [key("layers.0.attn.q out"), key("layers.0.mlp out")]


def test_backward_the_gradients_of_inputs_come_out_and_those_of_outputs_go_in() -> None:
    events = [key(event, "backward") for event in ("mlp out", "mlp.down out", "mlp.down in", "mlp in")]
    down = key("mlp.down in", "backward")
    assert first_divergences(events, {down, key("mlp in", "backward")}.__contains__) == [down]
    assert scope_of(down, {"mlp", "mlp.down"}) == "mlp.down"
    assert scope_of(key("mlp.down out", "backward"), {"mlp", "mlp.down"}) == "mlp"
