"""Every installed backend conforms; a backend that does not fails with the reason."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.backends import megatron_models
from tests.backends.hand_made import LAYOUT, Model, shard, tokens
from tpcheck.backends.custom import CustomBackend
from tpcheck.backends.dtensor.backend import DTensorBackend
from tpcheck.backends.interface import Backend
from tpcheck.backends.registry import backend_names
from tpcheck.testing.conformance import require_conformance

BACKENDS: Mapping[str, dict[str, Any]] = {
    "custom": {"backend": CustomBackend(shard, LAYOUT), "build": Model, "batch": tokens},
    "deepspeed": {"backend": "deepspeed"},
    "deepspeed-tp-model-init": {"backend": "deepspeed-tp-model-init"},
    "dtensor": {"backend": "dtensor"},
    "megatron": {"backend": "megatron", "build": megatron_models.build, "config": {"sequence_parallel": True}},
    "transformers": {"backend": "transformers"},
}

PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

SLOW = ("deepspeed-tp-model-init", "megatron", "transformers")  # whose own tests show most of it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in backend_names()]
)
def test_an_installed_backend_conforms(name: str) -> None:
    if name == "megatron":
        pytest.importorskip("megatron.core")
    require_conformance(**BACKENDS[name])


class Stale(DTensorBackend):
    """Returns the weights that it started with."""

    name = "stale"

    def shard(self, *args: Any) -> Any:
        candidate = super().shard(*args)
        kept = {name: candidate.parameter(name) for name in dict(candidate.module.named_parameters())}
        candidate.parameter = lambda name: kept[name]
        return candidate


class Uncopied(DTensorBackend):
    """Returns parameters instead of plain tensors."""

    name = "uncopied"

    def shard(self, *args: Any) -> Any:
        candidate = super().shard(*args)
        true = candidate.parameter
        candidate.parameter = lambda name: torch.nn.Parameter(true(name))
        return candidate


@pytest.mark.parametrize(
    ("backend", "message"),
    [(Stale(), "a clean run does not pass"), (Uncopied(), "is a Parameter, not a plain tensor")],
)
def test_a_backend_that_does_not_conform_fails_with_the_reason(backend: Backend, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        require_conformance(backend, build=Model, batch=tokens, config={"plan": PLAN})
