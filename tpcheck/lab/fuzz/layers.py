"""Searches the tensor-parallel layers of a backend, one by one, for a trial that differs from the plain layer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tpcheck.backends.interface import Backend, LayerTable, ParallelLayer
from tpcheck.core.errors import BackendError, RankFailure, TpcheckError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.lab.fuzz.layer_trial import RankTrial, TriedTensor, layer_table, try_layer
from tpcheck.lab.fuzz.results import (
    DTYPES,
    INPUT_GRADIENT,
    MAKING,
    OUTPUT,
    REFUSALS,
    STRIDES,
    Outcome,
    SearchResult,
    Trial,
    crash_kind,
    in_general,
)
from tpcheck.lab.fuzz.search import Limits, OnOutcome, require_hypothesis, search, versions_with
from tpcheck.lab.known import layer_register
from tpcheck.model.options import DEFAULTS
from tpcheck.numerics.activation_placement import infer_placement
from tpcheck.numerics.differences import Difference, compare_placed
from tpcheck.numerics.evidence import Kind, Suspect
from tpcheck.numerics.hypotheses import explain
from tpcheck.report import words
from tpcheck.world.world import World, spawn

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_MOST_WIDTH = 8
_MOST_ROWS = 3
_MOST_DIMS = 3


@dataclass(frozen=True, slots=True)
class LayerCommon:
    """The options that all trials share; `known` as for families."""

    backend: str | Backend = DEFAULTS.backend
    tp: tuple[int, ...] = (2, 4)
    dtype: tuple[str, ...] = DTYPES
    known: bool = False
    timeout: float = 60.0

    @property
    def backend_name(self) -> str:
        return self.backend if isinstance(self.backend, str) else self.backend.name


def fuzz_layers(
    names: Sequence[str], common: LayerCommon, limits: Limits, on_outcome: OnOutcome
) -> Iterator[SearchResult]:
    """Yield the search of each layer with these names, or of all; a layer that cannot be tried has a reason instead.

    Raises:
        UsageError: The backend does not list its layers, or has none of this name.
        TpcheckError: hypothesis is not installed.
    """
    require_hypothesis()
    table, versions = layer_table(common.backend), versions_with(common.backend)
    with Worlds(common, versions) as worlds:
        for layer in _selected(table, names):
            subject = {"layer": layer.name, "backend": common.backend_name, "examples": limits.examples}
            if layer.shard is None:
                refused = Outcome("refused", reason=layer.why_not)
                yield SearchResult(subject, (refused,), environment=versions)
                continue
            searched = search(trials(layer, table, common), worlds.outcome, limits, on_outcome)
            yield replace(searched, subject={**subject, "seed": limits.seed}, environment=versions)
            if searched.interrupted:
                return


def try_one(trial: Trial, common: LayerCommon) -> Outcome:
    """Return the outcome of one trial.

    Raises:
        UsageError: The backend has no such layer.
    """
    table, versions = layer_table(common.backend), versions_with(common.backend)
    _selected(table, [trial.layer])
    with Worlds(common, versions) as worlds:
        return worlds.outcome(trial)


class Worlds(ExitStack):
    """One world for each TP size, kept for all trials."""

    def __init__(self, common: LayerCommon, versions: Mapping[str, str]) -> None:
        super().__init__()
        self._common = common
        self._versions = versions
        self._worlds: dict[int, World] = {}

    def outcome(self, trial: Trial) -> Outcome:
        """Run one trial on every rank, and return its outcome."""
        try:
            by_rank = self._world(trial.tp).run(try_layer, self._common.backend, trial)
        except RankFailure as failure:
            if isinstance(failure.exception, TpcheckError) and not isinstance(failure.exception, BackendError):
                raise failure.exception from failure
            crash = failure.exception if isinstance(failure.exception, BackendError) else failure
            return self.judge_crash(trial, str(crash))
        return self.judge(trial, by_rank)

    def judge(self, trial: Trial, by_rank: Sequence[RankTrial]) -> Outcome:
        """Return the outcome of a trial without a crash: the first tensor that is wrong on any rank decides."""
        command = trial_command(trial, self._common.backend_name)
        if _overlaps(by_rank):  # the gradients of the parts would not add up to the whole's
            return Outcome("refused", reason="several ranks hold the same part of the weight", command=command)
        for name in by_rank[0].tensors:
            tensors = [rank.tensors[name] for rank in by_rank]
            differences = [_difference(tensor) for tensor in tensors]
            if not all(difference.agrees for difference in differences):
                known = self._known(trial, verdict="failed", tensor=name)
                return known or _failed(trial, name, tensors, differences, command)
        return Outcome("passed", command=command)

    def judge_crash(self, trial: Trial, message: str) -> Outcome:
        """Return the outcome of a trial in which a layer raised: a known bug, a refusal, or a finding."""
        known = self._known(trial, verdict="error", message=message)
        if known is not None:
            return known
        command = trial_command(trial, self._common.backend_name)
        line = next(iter(message.strip().splitlines()), "")
        phase, _, rest = line.removeprefix(f"{trial.layer}, ").partition(": ")
        if phase == MAKING and rest.partition(": ")[0] in REFUSALS:
            return Outcome("refused", reason=in_general(line), command=command)
        return Outcome("error", crash_kind(trial.layer, f"{phase} {rest}"), line, command, {"message": message})

    def _known(self, trial: Trial, **failure: str) -> Outcome | None:
        """Return the outcome of a trial that fails as a registered bug does; None for any other failure."""
        for bug in layer_register() if self._common.known else ():
            if bug.explains(trial, self._common.backend_name, self._versions, **failure):
                return Outcome("known", bug.name, bug.what, trial_command(trial, self._common.backend_name))
        return None

    def _world(self, tp: int) -> World:
        if tp not in self._worlds:
            self._worlds[tp] = self.enter_context(spawn(Topology(tp=tp), timeout=self._common.timeout))
        return self._worlds[tp]


def trials(layer: ParallelLayer, table: LayerTable, common: LayerCommon) -> SearchStrategy[Trial]:
    """Return the strategy that draws trials of one kind of layer."""
    from hypothesis import strategies as st

    widths = st.integers(1, _MOST_WIDTH)
    rows = st.lists(st.integers(1, _MOST_ROWS), min_size=layer.num_rows or 1, max_size=layer.num_rows or _MOST_DIMS)

    @st.composite
    def drawn(draw: DrawFn) -> Trial:
        return Trial(
            layer.name,
            tp=draw(st.sampled_from(common.tp)),
            inputs=draw(widths),
            outputs=draw(widths),
            rows=tuple(draw(rows)),
            bias=layer.plain != "embedding" and draw(st.booleans()),
            dtype=draw(st.sampled_from(common.dtype)),
            strides=draw(st.sampled_from(STRIDES)),
            gradient_strides=draw(st.sampled_from(STRIDES)),
            options=_drawn_options(draw, table),
        )

    return drawn()


def trial_command(trial: Trial, backend: str) -> str:
    """Return the command that reproduces a trial.

    Example:
        >>> trial_command(Trial("LinearLayer", bias=True), "deepspeed")
        'tpcheck fuzz --layers --trial \\'{"layer": "LinearLayer", "bias": true}\\''
    """
    of_backend = [] if backend == DEFAULTS.backend else ["--backend", backend]
    return shlex.join(["tpcheck", "fuzz", "--layers", *of_backend, "--trial", trial.to_json()])


def _drawn_options(draw: DrawFn, table: LayerTable) -> dict[str, Any]:
    """Draw the settings that all layers share; those with their usual value are left out."""
    from hypothesis import strategies as st

    drawn = {name: draw(st.sampled_from(values)) for name, values in table.options.items()}
    return {name: value for name, value in drawn.items() if value != table.options[name][0]}


def _selected(table: LayerTable, names: Sequence[str]) -> list[ParallelLayer]:
    known = {layer.name: layer for layer in table.layers}
    for name in names:
        if name not in known:
            raise UsageError("layer", name, list(known))
    return [known[name] for name in names] if names else list(known.values())


def _overlaps(by_rank: Sequence[RankTrial]) -> bool:
    """Return whether ranks hold the same part of a weight, other than the whole of one that the layer replicates."""
    for name in by_rank[0].local_positions:
        positions = [rank.local_positions[name].reshape(-1).tolist() for rank in by_rank]
        by_design = name.startswith(by_rank[0].replicates)
        is_replicated = by_design and all(sorted(held) == sorted(positions[0]) for held in positions)
        held = [position for of_rank in positions for position in of_rank]
        if not name.endswith("bias") and not is_replicated and len(set(held)) < len(held):
            return True
    return False


def _failed(
    trial: Trial, name: str, tensors: Sequence[TriedTensor], differences: Sequence[Difference], command: str
) -> Outcome:
    worst = max(differences, key=lambda difference: difference.margin)
    data: dict[str, Any] = {
        "tensor": name,
        "ranks": [rank for rank, difference in enumerate(differences) if not difference.agrees],
        "observed": worst.relative,
        "allowed": worst.relative_allowed,
        "margin": worst.margin,
        "cause": _cause(name, tensors, worst),
    }
    reason = f"{trial.layer}: {name} has a relative error of {words.error(data['observed'])}"
    reason += f" on {words.ranks(data['ranks'])}" + (f"; {data['cause']}" if data["cause"] else "")
    return Outcome("failed", f"{trial.layer} {name}", reason, command, data)


def _difference(tensor: TriedTensor) -> Difference:
    placed = infer_placement(tensor.expected.shape, [tensor.actual])
    if placed is None:
        return Difference.unbounded(tensor.expected, tensor.allowed, 1)
    return compare_placed(placed, tensor.expected, tensor.allowed)


def _cause(name: str, tensors: Sequence[TriedTensor], worst: Difference) -> str | None:
    """Return the cause whose test holds on the tensors of all ranks; None for tensors of wrong shapes."""
    if any(tensor.actual.shape != tensor.expected.shape for tensor in tensors):
        return None
    kinds: Mapping[str, Kind] = {OUTPUT: "activation", INPUT_GRADIENT: "input_gradient"}
    whole = tensors[0].expected
    is_replicated = all(torch.equal(tensor.expected, whole) for tensor in tensors)
    explanation = explain(
        Suspect(
            check="",
            where={},
            role="input" if name == INPUT_GRADIENT else "output" if name == OUTPUT else None,
            observed=worst.relative,
            allowed=worst.relative_allowed,
            kind=kinds.get(name, "gradient"),
            expected=whole if is_replicated else None,
            actual_parts=tuple(tensor.actual for tensor in tensors),
            expected_parts=tuple(tensor.expected for tensor in tensors),
            is_replicated=is_replicated,
            allowed_error=max(tensor.allowed for tensor in tensors),
        )
    )
    return None if explanation is None else explanation.cause.slug
