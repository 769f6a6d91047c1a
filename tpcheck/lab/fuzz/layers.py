"""Searches the tensor-parallel layers of a backend, one by one, for a trial that differs from the plain layer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tpcheck.core.environment import package_versions
from tpcheck.core.errors import BackendError, RankFailure, TpcheckError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.lab.fuzz.judge import crashed_trial, judged_trial
from tpcheck.lab.fuzz.results import DTYPES, STRIDES, Outcome, SearchResult, Trial
from tpcheck.lab.fuzz.search import Limits, OnOutcome, require_hypothesis, search
from tpcheck.model.options import DEFAULTS
from tpcheck.world.world import World, spawn

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

    from tpcheck.backends.interface import Backend, LayerTable, ParallelLayer

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
    table, versions = _table(common.backend)
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
    table, versions = _table(common.backend)
    _selected(table, [trial.layer])
    with Worlds(common, versions) as worlds:
        return worlds.outcome(trial)


class Worlds:
    """One world for each TP size, kept for all trials."""

    def __init__(self, common: LayerCommon, versions: Mapping[str, str]) -> None:
        self._common = common
        self._versions = versions
        self._stack = ExitStack()
        self._worlds: dict[int, World] = {}

    def outcome(self, trial: Trial) -> Outcome:
        """Run one trial on every rank, and return its outcome."""
        from tpcheck.lab.fuzz.layer_trial import try_layer

        command = trial_command(trial, self._common.backend_name)
        try:
            by_rank = self._world(trial.tp).run(try_layer, self._common.backend, trial)
        except RankFailure as failure:
            if isinstance(failure.exception, TpcheckError) and not isinstance(failure.exception, BackendError):
                raise failure.exception from failure
            message = str(failure.exception if isinstance(failure.exception, BackendError) else failure)
            return crashed_trial(trial, message, self._common, self._versions, command)
        return judged_trial(trial, by_rank, self._common, self._versions, command)

    def _world(self, tp: int) -> World:
        if tp not in self._worlds:
            self._worlds[tp] = self._stack.enter_context(spawn(Topology(tp=tp), timeout=self._common.timeout))
        return self._worlds[tp]

    def __enter__(self) -> Worlds:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def trials(layer: ParallelLayer, table: LayerTable, common: LayerCommon) -> SearchStrategy[Trial]:
    """Return the strategy that draws trials of one kind of layer."""
    from hypothesis import strategies as st

    widths = st.integers(1, _MOST_WIDTH)

    @st.composite
    def drawn(draw: DrawFn) -> Trial:
        return Trial(
            layer.name,
            tp=draw(st.sampled_from(common.tp)),
            inputs=draw(widths),
            outputs=draw(widths),
            rows=tuple(draw(st.lists(st.integers(1, _MOST_ROWS), min_size=1, max_size=_MOST_DIMS))),
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


def _table(backend: str | Backend) -> tuple[LayerTable, dict[str, str]]:
    from tpcheck.backends.registry import load_backend
    from tpcheck.lab.fuzz.layer_trial import layer_table

    return layer_table(backend), {**package_versions(), **load_backend(backend).versions()}


def _selected(table: LayerTable, names: Sequence[str]) -> list[ParallelLayer]:
    known = {layer.name: layer for layer in table.layers}
    for name in names:
        if name not in known:
            raise UsageError("layer", name, list(known))
    return [known[name] for name in names] if names else list(known.values())


def read_trial(text: str) -> Trial:
    """Return the trial in the text of `--trial`.

    Raises:
        UsageError: The text is no valid trial.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError("trial", text, f"a JSON object ({error})") from error
    if not isinstance(values, dict):
        raise UsageError("trial", text, "a JSON object")
    return Trial.of(values)
