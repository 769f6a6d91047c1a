"""Other attentions, experts, recomputation and compiled layers of the sharded model; what cannot be had is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tests.backends import hand_made
from tpcheck import Topology, UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.families.build import small_model
from tpcheck.model.implementations import (
    compile_module,
    compiled_modules,
    replace_implementations,
    require_compiled,
    run_eagerly,
)
from tpcheck.model.options import DEFAULTS, Request, require_valid
from tpcheck.numerics.recorder import ModuleRecorder, is_compiled

OPTIONS = TrainingOptions(dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(hidden))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.layers[1].experts = nn.ModuleList([nn.Linear(2, 2)])  # type: ignore[union-attr]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_a_model_of_transformers_is_given_what_is_asked_for() -> None:
    model: Any = small_model("qwen3_moe")
    replace_implementations(model, replace(OPTIONS, attention="sdpa", experts="batched_mm", checkpointing=True))
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", "batched_mm")
    assert model.model.layers[0].gradient_checkpointing
    assert model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is False
    replace_implementations(model, replace(OPTIONS, checkpointing=True, reentrant=True))
    assert model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is True


class OwnAttention(nn.Module):
    """What transformers' models do that cannot change their attention: they warn, and go on."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager", sub_configs={})

    def set_attn_implementation(self, name: str) -> None: ...

    def activation_checkpointing_enable(self, options: Any) -> None:
        raise ValueError("OwnAttention does not support gradient checkpointing.  More.")


class NothingRecomputed(nn.Module):
    def gradient_checkpointing_enable(self, options: Any) -> None: ...


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Block, {"attention": "sdpa"}, "attention='sdpa': expected None: only a model of transformers"),
        (Block, {"experts": "batched_mm"}, "experts='batched_mm': expected None: only a model of transformers"),
        (Block, {"checkpointing": True}, "checkpointing=True: expected False: transformers' models alone"),
        (Block, {"attention": "flex_attention"}, "no backward pass on a CPU"),
        (Block, {"experts": "grouped_mm"}, "takes no float64"),
        (OwnAttention, {"attention": "sdpa"}, "expected eager: OwnAttention keeps its own"),
        (OwnAttention, {"checkpointing": True}, r"for this model \(OwnAttention does not support gradient"),
        (NothingRecomputed, {"checkpointing": True}, "no module of NothingRecomputed recomputes anything"),
    ],
)
def test_what_a_model_cannot_have_is_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace_implementations(model(), replace(OPTIONS, **options))


def test_the_outermost_layers_are_compiled_or_the_model() -> None:
    model = Model()
    assert not compiled_modules(model, OPTIONS)
    assert compiled_modules(model, replace(OPTIONS, compile=True)) == {"": model}
    layers = compiled_modules(model, replace(OPTIONS, compile_layers=True))
    assert list(layers) == ["layers.0", "layers.1"]
    with pytest.raises(UsageError, match=r"no nn.ModuleList of layers"):
        compiled_modules(Block(), replace(OPTIONS, compile_layers=True))


def test_a_model_that_compiles_itself_runs_eagerly_as_the_reference() -> None:
    model = Model()
    hidden = torch.randn(3, 2)
    expected = model(hidden)

    def never(*args: Any) -> Any:
        raise AssertionError("compiled")

    model.layers[0].compile(backend=never)
    model.layers[1].inner = torch.compile(model.layers[1].inner, backend=never)  # type: ignore[union-attr]
    run_eagerly(model)
    assert torch.equal(model(hidden), expected)


def test_the_hooks_of_a_compiled_module_stay_as_they_are() -> None:
    model, compiling = Block(), list[bool]()
    model.register_forward_pre_hook(lambda module, args: compiling.append(torch.compiler.is_compiling()))
    compile_module(model)
    assert is_compiled(model)
    model._compiled_call_impl = torch.compile(model._call_impl, backend="aot_eager")  # the default one takes seconds
    model(torch.randn(3, 2))
    assert compiling == [False]


def test_a_run_that_compiled_nothing_is_refused() -> None:
    require_compiled(OPTIONS, 0)
    require_compiled(replace(OPTIONS, compile=True), 1)
    with pytest.raises(UsageError, match="compile_layers=True: expected False: torch compiled nothing"):
        require_compiled(replace(OPTIONS, compile_layers=True), 0)


def test_what_goes_into_and_out_of_a_compiled_layer_is_recorded() -> None:
    model, seen = Model(), list[str]()
    hidden = torch.randn(3, 2, requires_grad=True)
    expected = model(hidden)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    with ModuleRecorder(model, lambda key, tensor: seen.append(str(key))):
        output = model(hidden)
        output.sum().backward()
    assert torch.equal(output, expected)
    assert not [name for name in seen if "inner" in name]
    for name in ("layers.0: input 0", "layers.1: output 0", "layers.0: gradient of output 0", "model: output 0"):
        assert name in seen


class Compiled(hand_made.Model):
    """Compiles its own layers, in both of torch's ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].compile(backend="aot_eager")
        self.head = torch.compile(self.head, backend="aot_eager")  # type: ignore[assignment]


def test_a_model_that_compiles_its_own_layers_is_verified() -> None:
    report = tpcheck.verify(
        Compiled,
        hand_made.tokens,
        topology=Topology(tp=2),
        shard=hand_made.shard,
        layout=hand_made.LAYOUT,
        steps=1,
        replays=1,
    )
    assert report.passed, report
    reason = "not seen on every rank of the sharded model"
    not_compared = report.verdict.coverage.not_compared
    assert {name.partition("layers.0.")[1] for name, why in not_compared.items() if why == reason} == {"layers.0."}


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "flash"},
        {"experts": 3},
        {"checkpointing": "full"},
        {"compile": 1},
        {"reentrant": True},
        {"compile": True, "checkpointing": True},
        {"compile_layers": True, "checkpointing": True},
        {"compile": True, "loop": "trainer"},
    ],
)
def test_a_name_that_does_not_exist_is_bad_usage(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        require_valid(Request(lambda: None, replace(DEFAULTS, **change)))


def test_another_attention_and_recomputation_pass() -> None:
    report = tpcheck.verify_family(
        "llama", topology=Topology(tp=2), attention="sdpa", checkpointing=True, steps=1, replays=4
    )
    assert report.passed, report
    assert report.verdict.subject["attention"] == "sdpa"
