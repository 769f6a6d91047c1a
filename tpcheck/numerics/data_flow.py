"""Which recorded tensor is computed from which, as autograd knows it: what runs between two modules is seen, too."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tpcheck.numerics.evidence import Collective, Evidence, Phase, Step, TensorKey


class DataFlow:
    """Collects, for each tensor that a recorder sees in the forward pass, the recorded tensors nearest before it.

    A tensor without a gradient has no sources. Leaves of autograd's graph, such as parameters, are not recorded: of
    each, `uses` has the recorded tensors that are computed from it, without another between them.

    Example:
        >>> leaf = torch.ones(2, requires_grad=True)
        >>> flow, x = DataFlow(), leaf * 1
        >>> flow.add("x", x)
        >>> flow.add("y", x.exp() + 1)
        >>> flow.sources, flow.uses
        ({'x': (), 'y': ('x',)}, {tensor([1., 1.], requires_grad=True): ['x']})
    """

    def __init__(self) -> None:
        self.sources: dict[Any, tuple[Any, ...]] = {}
        self.uses: dict[torch.Tensor, list[Any]] = {}
        self._keys: dict[Any, Any] = {}  # by autograd's node; the nodes are the same objects as long as they are here

    def add(self, key: Any, tensor: torch.Tensor) -> None:
        """Add a tensor that has a node of its own (a view, a copy)."""
        node = tensor.grad_fn
        if node is not None:
            self.sources[key] = tuple(self._nearest(node, key))
            self._keys[node] = key

    def _nearest(self, node: Any, key: Any) -> Iterator[Any]:
        seen, waiting = {node}, [node]
        while waiting:
            for before, _ in waiting.pop().next_functions:
                if before is None or before in seen:
                    continue
                seen.add(before)
                if before in self._keys:
                    yield self._keys[before]
                else:
                    waiting.append(before)
                leaf = getattr(before, "variable", None)
                if leaf is not None:
                    self.uses.setdefault(leaf, []).append(key)


def consumers(evidence: Evidence, step: int, key: TensorKey) -> tuple[TensorKey, ...]:
    """Return the recorded tensors that are computed from `key` without another between them.

    Backward, the gradients that are computed from a gradient: those of the tensors from which its own was computed.
    """
    sources = evidence.reference[step].sources
    if key.phase == "forward":
        return tuple(after for after, before in sources.items() if key in before)
    forward = sources.get(in_phase(key, "forward"), ())
    return tuple(in_phase(before, "backward") for before in forward)


def is_inside(module: str, scope: str) -> bool:
    """Return whether `module` is `scope` or one of its submodules."""
    return not scope or module == scope or module.startswith(f"{scope}.")


def is_result(event: TensorKey) -> bool:
    """Return whether the module computes the event, rather than receives it."""
    return event.role == ("output" if event.phase == "forward" else "input")


def in_phase(key: TensorKey, phase: Phase) -> TensorKey:
    """Return the key of the activation, or of its gradient."""
    return replace(key, phase=phase)


def is_exchanged_behind(evidence: Evidence, step: int, key: TensorKey) -> bool:
    """Return whether every rank issues a collective between `key` and what is computed from it, not in other modules.

    What a module returns may be the result of the modules around it, too: then the collective may come after them.
    False where it is unknown what is computed from it, True where collectives are unknown.
    """
    return all(_is_exchanged_behind(evidence, step, key, rank) for rank in range(len(evidence.candidate[step])))


def _is_exchanged_behind(evidence: Evidence, step: int, key: TensorKey, tp_rank: int) -> bool:
    if not evidence.candidate[step][tp_rank].logs_collectives:
        return True
    module = key.module
    while True:
        nearest, issued = collectives_behind(evidence, step, key, tp_rank, module)
        if issued:
            return True
        if nearest is None or not (is_inside(module, nearest.module) and is_result(nearest)):
            return False
        key = nearest


def is_exchanged_before(evidence: Evidence, step: int, gradient: TensorKey) -> bool:
    """Return whether every rank issues a collective between the gradients that one is computed from and this one."""
    after = consumers(evidence, step, in_phase(gradient, "forward"))
    return all(_is_exchanged_before(rank, gradient, after) for rank in evidence.candidate[step])


def _is_exchanged_before(rank: Step, gradient: TensorKey, after: Collection[TensorKey]) -> bool:
    positions = {each: position for position, each in enumerate(rank.activations)}
    if gradient not in positions:
        return False
    start = max((positions.get(in_phase(each, "backward"), -1) for each in after), default=-1)
    between = range(start + 1, positions[gradient] + 1)
    return any(each.phase == gradient.phase and each.position in between for each in rank.collectives)


def collectives_behind(
    evidence: Evidence, step: int, key: TensorKey, tp_rank: int, module: str
) -> tuple[TensorKey | None, tuple[Collective, ...]]:
    """Return the first tensor that is computed from `key` on a rank, and the collectives between the two.

    Without those of modules that have no `module` inside.
    """
    recorded = evidence.candidate[step][tp_rank]
    positions = {each: position for position, each in enumerate(recorded.activations)}
    start = positions.get(key, len(positions))
    after = [each for each in consumers(evidence, step, key) if positions.get(each, -1) > start]
    if not after:
        return None, ()
    nearest = min(after, key=positions.__getitem__)
    between = range(start + 1, positions[nearest] + 1)
    issued = (each for each in recorded.collectives if each.phase == key.phase and each.position in between)
    return nearest, tuple(each for each in issued if _is_around(module, each, positions))


def _is_around(module: str, collective: Collective, positions: Mapping[TensorKey, int]) -> bool:
    """Return whether the collective was issued by no module but those around `module`."""
    if not is_inside(module, collective.module):
        return False
    return all(is_inside(module, running) for running in _running(collective, positions))


def _running(collective: Collective, positions: Mapping[TensorKey, int]) -> Collection[str]:
    """Return the modules that have received something when a collective is issued, and return something later."""
    received, returned = set(), set()
    for key, position in positions.items():
        if key.phase == collective.phase:
            if is_result(key) and position >= collective.position:
                returned.add((key.module, key.call, key.micro_batch))
            elif not is_result(key) and position < collective.position:
                received.add((key.module, key.call, key.micro_batch))
    return {module for module, *_ in received & returned}
