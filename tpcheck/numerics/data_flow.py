"""Which recorded tensor is computed from which, as autograd knows it: what runs between two modules is seen, too."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
        >>> flow.add("z", 2 * x - leaf)
        >>> flow.linear  # x with a gradient of 2, whatever x is
        {'x': (), 'y': (), 'z': ('x',)}
    """

    def __init__(self) -> None:
        self.sources: dict[Any, tuple[Any, ...]] = {}
        self.linear: dict[Any, tuple[Any, ...]] = {}  # those of `sources` in which a tensor is linear
        self.uses: dict[torch.Tensor, list[Any]] = {}
        self._keys: dict[Any, Any] = {}  # by autograd's node; the nodes are the same objects as long as they are here

    def add(self, key: Any, tensor: torch.Tensor) -> None:
        """Add a tensor that has a node of its own (a view, a copy)."""
        node = tensor.grad_fn
        if node is not None:
            self.sources[key] = tuple(self._nearest(node, key))
            self.linear[key] = tuple(source for source, is_linear in self._linearity(node).items() if is_linear)
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

    def _linearity(self, start: Any) -> dict[Any, bool]:
        """Return of each recorded tensor nearest before a node whether what the node computes is linear in it."""
        known: dict[Any, dict[Any, bool]] = {}
        waiting = [start]
        while waiting:
            node = waiting.pop()
            inputs = [before for before, _ in node.next_functions]
            unknown = [each for each in inputs if each not in known and each not in self._keys and each is not None]
            if unknown:
                waiting.extend((node, *unknown))
            elif node not in known:
                of_inputs = ({self._keys[each]: True} if each in self._keys else known.get(each, {}) for each in inputs)
                known[node] = _linear_in(node.name().partition("Backward")[0], list(of_inputs))
        return known[start]


# Of autograd's nodes: linear in all inputs together; in each input by itself; in the first.
_SUMS = frozenset(
    "Add Sub Rsub Neg Sum Mean Cat Stack View UnsafeView ReshapeAlias Alias T Transpose Permute Squeeze Unsqueeze "
    "Expand Repeat Clone ToCopy Slice Select Split SplitWithSizes Unbind Index IndexSelect Gather AsStrided Flip "
    "ConstantPadNd".split()
)
_PRODUCTS = frozenset("Mul Mm Mv Bmm Dot Addmm Addbmm Baddbmm Linear MkldnnLinear".split())
_QUOTIENTS = frozenset(["Div"])


def _linear_in(operation: str, of_inputs: Sequence[Mapping[Any, bool]]) -> dict[Any, bool]:
    """Return what the result of an operation is linear in, of what its inputs are computed from.

    An operation that is not known counts as none.
    """
    linear: dict[Any, bool] = {}
    for number, of_input in enumerate(of_inputs):
        for source, is_linear in of_input.items():
            if operation in _SUMS:
                linear[source] = is_linear and linear.get(source, True)
            elif operation in _PRODUCTS:
                linear[source] = is_linear and source not in linear
            else:
                linear[source] = is_linear and source not in linear and operation in _QUOTIENTS and number == 0
    return linear


def consumers(evidence: Evidence, step: int, key: TensorKey) -> tuple[TensorKey, ...]:
    """Return the recorded tensors that are computed from `key` without another between them.

    Backward, the gradients that are computed from a gradient: those of the tensors from which its own was computed.
    """
    sources = evidence.reference[step].sources
    if key.phase == "forward":
        return tuple(after for after, before in sources.items() if key in before)
    forward = sources.get(in_phase(key, "forward"), ())
    return tuple(in_phase(before, "backward") for before in forward)


def feeding(evidence: Evidence, step: int, key: TensorKey) -> tuple[TensorKey, ...]:
    """Return the recorded tensors that `key` is computed from without another between them.

    Backward, the gradients that a gradient is computed from: those of the tensors that are computed from its own.
    """
    if key.phase == "forward":
        return evidence.reference[step].sources.get(key, ())
    return tuple(in_phase(after, "backward") for after in consumers(evidence, step, in_phase(key, "forward")))


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

    What a module returns may be the result of the modules around it, too: then the collective may come after them. And
    terms of a sum stay terms through whatever is linear, such as the other half of an adapter: then it may come after
    that, wherever they go. Where a backward pass ends they may be summed in gradients of parameters.
    False where it is unknown what is computed from it, True where collectives are unknown.
    """
    return all(_is_exchanged_behind(evidence, step, key, rank) for rank in range(len(evidence.candidate[step])))


def _is_exchanged_behind(evidence: Evidence, step: int, key: TensorKey, tp_rank: int) -> bool:
    if not evidence.candidate[step][tp_rank].logs_collectives:
        return True
    waiting, seen = [key], {key}
    while waiting:
        terms = waiting.pop()
        nearest, issued = collectives_behind(evidence, step, terms, tp_rank, key.module)
        if issued:
            continue
        if nearest is None:
            if not _gives_equal_gradients(evidence, step, terms):
                return False
            continue
        after: tuple[TensorKey, ...] = (nearest,)
        is_around = is_inside(key.module, nearest.module) and nearest.module != terms.module
        if not (is_around and is_result(nearest)):
            after = consumers(evidence, step, terms)
            if not all(_stay_terms(evidence, step, terms, each) for each in after):
                return False
        waiting.extend(each for each in after if each not in seen)
        seen.update(after)
    return True


def _stay_terms(evidence: Evidence, step: int, terms: TensorKey, after: TensorKey) -> bool:
    """Return whether terms of a sum give terms of what is computed from them: it is linear, and no weight is cut.

    Gradients are linear in the gradients that they are computed from.
    """
    is_linear = terms.phase == "backward" or terms in evidence.reference[step].linear.get(after, ())
    return is_linear and (after.module != terms.module or not _own_layouts(evidence, terms.module, cut=True))


def _gives_equal_gradients(evidence: Evidence, step: int, key: TensorKey) -> bool:
    """Return whether a backward pass ends at a module whose own parameters have gradients that all ranks agree on."""
    if key.phase == "forward" or is_result(key):
        return False
    names = [
        name for name in _own_layouts(evidence, key.module) if evidence.reference[step].gradients.get(name) is not None
    ]
    first, *others = evidence.candidate[step]
    return bool(names) and all(
        (gradient := rank.gradients.get(name)) is not None
        and (of_first := first.gradients.get(name)) is not None
        and torch.equal(gradient, of_first)
        for rank in others
        for name in names
    )


def _own_layouts(evidence: Evidence, module: str, *, cut: bool = False) -> list[str]:
    """Return the names of a module's own parameters: all, or those that are cut."""
    return [
        name
        for name, layout in evidence.layouts.items()
        if name.rpartition(".")[0] == module and not (cut and layout.is_replicated)
    ]


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
