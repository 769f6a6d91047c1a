"""Faults that any backend's candidate can bear, since they touch nothing but its module and the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.adapters import Backend, Candidate
from tpcheck.collect.tree import map_tensors
from tpcheck.faults import Live, PlantedBackend

_SCALE = 1.01


def planted(backend: str | Backend, fault: str) -> PlantedBackend:
    """Return a backend whose candidates bear the fault of that name."""

    def plant(live: Live) -> None:
        live.candidate = _FAULTS[fault](live.candidate)

    return PlantedBackend(plant, backend)


def _scaled_weight(candidate: Candidate) -> Candidate:
    with torch.no_grad():
        _a_matrix(candidate).mul_(_SCALE)
    return candidate


def _scaled_output(candidate: Candidate) -> Candidate:
    def scaled(module: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(lambda tensor: tensor * _SCALE, output)

    owner = next(one for one in candidate.module.modules() if _a_matrix(candidate) in _own(one))
    owner.register_forward_hook(scaled)
    return candidate


def _scaled_gradient(candidate: Candidate) -> Candidate:
    return _Scaling(candidate)


def _skipped_step(candidate: Candidate) -> Candidate:
    return _Standing(candidate)


_FAULTS: Mapping[str, Callable[[Candidate], Candidate]] = {
    "a scaled weight": _scaled_weight,
    "a scaled output": _scaled_output,
    "a scaled gradient": _scaled_gradient,
    "a skipped step": _skipped_step,
}
EXPECTED: Mapping[str, str] = {
    "a scaled weight": "weights_match_reference",
    "a scaled output": "outputs_match_reference",
    "a scaled gradient": "gradients_match_reference",
    "a skipped step": "updates_match_reference",
}
"""The check that must find each fault."""


class _Borne:
    """Hands everything on to the candidate that it is put around."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._candidate, name)


class _Scaling(_Borne):
    """Scales what reaches the parameter, before anybody reduces it."""

    def forward(self, batch: Mapping[str, Any]) -> Any:
        matrix = _a_matrix(self._candidate)
        if matrix not in getattr(self, "_hooked", ()):
            self._hooked = {matrix}
            matrix.register_hook(lambda gradient: gradient * _SCALE)  # type: ignore[no-untyped-call]
        return self._candidate.forward(batch)


class _Standing(_Borne):
    """Does everything that a step does, and leaves the weights where they were."""

    def step(self) -> None:
        before = {name: one.detach().clone() for name, one in self._candidate.module.named_parameters()}
        self._candidate.step()
        with torch.no_grad():
            for name, parameter in self._candidate.module.named_parameters():
                parameter.copy_(before[name])


def _a_matrix(candidate: Candidate) -> nn.Parameter:
    """Return the last matrix that is sharded, or the last there is; that of a linear module, whose output it scales."""
    layouts = candidate.layouts()
    matrices = [(name, parameter) for name, parameter in candidate.module.named_parameters() if parameter.dim() == 2]
    sharded = [one for name, one in matrices if name in layouts and not layouts[name].is_replicated]
    return (sharded or [one for _, one in matrices])[-1]


def _own(module: nn.Module) -> set[nn.Parameter]:
    return set(module.parameters(recurse=False))
