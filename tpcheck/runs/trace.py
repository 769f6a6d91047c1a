"""A trace: the recording of every rank in a folder, read without unpickling anything but tensors and text."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.layout import Layout
from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.numerics.evidence import Step, TensorKey

Tensor = Any


@dataclass(frozen=True, slots=True)
class RankRecording:
    """One rank's part of a trace.

    Attributes:
        rank: Its global rank.
        topology: Topology of the recorded world.
        dtype: Name of the dtype of the parameters.
        initial: Its parameters before the first step.
        buffers: Names of its buffers.
        layouts: How its parameters lie over the TP group, as far as their layers know.
        steps: One for each call of the model; weights are those after the optimizer's step, empty where there was none.
        inputs: The tensors that the model was given at each step, by their path.
        deviations: How far each tensor moves in perturbed replays; None for a sharded model.
        versions: Versions of the packages.
    """

    rank: int
    topology: Topology
    dtype: str
    initial: Mapping[str, Tensor]
    buffers: tuple[str, ...]
    layouts: Mapping[str, Layout]
    steps: tuple[Step, ...]
    inputs: tuple[Mapping[str, Tensor], ...]
    deviations: Mapping[Hashable, float] | None
    versions: Mapping[str, str]


_FORMAT = 1


class TraceWriter:
    """Write all ranks' files to a temporary folder, then rename it over the old trace."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or any(path.glob("rank_*.pt")))):
            raise UsageError("path", str(path), "a new path, or an existing trace to replace")
        if not path.absolute().parent.is_dir():
            raise UsageError("path", str(path), "a path whose parent folder exists")
        self._path = path

    def write(self, recorded: RankRecording) -> None:
        """Write this rank's part; collective over the world."""
        partial = self._path.with_name(f".{self._path.name}.partial")
        if recorded.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        _barrier()
        torch.save(_as_plain(recorded), partial / f"rank_{recorded.rank:05}.pt")
        _barrier()
        if recorded.rank == 0:
            shutil.rmtree(self._path, ignore_errors=True)
            partial.rename(self._path)
        _barrier()


def read_trace(name: str, path: str | Path) -> tuple[RankRecording, ...]:
    """Return what every rank recorded.

    Raises:
        UsageError: There is no trace at that path.
        TpcheckError: The trace is damaged or incomplete.
    """
    files = sorted(Path(path).glob("rank_*.pt"))
    if not files:
        raise UsageError(name, str(path), "a folder that tpcheck.record has written")
    try:
        ranks = tuple(_as_recorded(torch.load(file, weights_only=True, map_location="cpu")) for file in files)
        is_complete = [recorded.rank for recorded in ranks] == list(range(ranks[0].topology.world_size))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TpcheckError(f"{path} is not a readable trace: {reason}") from error
    if not is_complete:
        raise TpcheckError(f"{path} holds {len(ranks)} of the {ranks[0].topology.world_size} ranks that were recorded")
    return ranks


def _barrier() -> None:
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _as_plain(recorded: RankRecording) -> dict[str, Any]:
    """Return the recording as tensors by name and everything else as JSON."""
    facts = {
        "format": _FORMAT,
        "rank": recorded.rank,
        "topology": recorded.topology.sizes,
        "dtype": recorded.dtype,
        "buffers": recorded.buffers,
        "layouts": {name: [layout.shape, layout.local_shapes] for name, layout in recorded.layouts.items()},
        "losses": [step.loss for step in recorded.steps],
        "deviations": _deviations_as_plain(recorded.deviations),
        "versions": dict(recorded.versions),
    }
    steps = [
        {
            "activations": {json.dumps(asdict(key)): tensor for key, tensor in step.activations.items()},
            "gradients": dict(step.gradients),
            "weights": dict(step.weights),
            "buffers": dict(step.buffers),
        }
        for step in recorded.steps
    ]
    sources = {name: layout.source for name, layout in recorded.layouts.items()}
    tensors = {"initial": dict(recorded.initial), "steps": steps, "inputs": list(map(dict, recorded.inputs))}
    return {"facts": json.dumps(facts), "sources": sources, **tensors}


def _as_recorded(plain: Any) -> RankRecording:
    if not isinstance(plain, dict):
        raise TypeError(f"it holds a {type(plain).__name__}, not a dict")
    facts = json.loads(plain["facts"])
    if facts["format"] != _FORMAT:
        raise ValueError(f"its format is {facts['format']}, not {_FORMAT}")
    layouts = {
        name: Layout(tuple(shape), tuple(map(tuple, local_shapes)), plain["sources"][name])
        for name, (shape, local_shapes) in facts["layouts"].items()
    }
    steps = tuple(
        Step(
            activations={TensorKey(**json.loads(key)): tensor for key, tensor in step["activations"].items()},
            gradients=step["gradients"],
            weights=step["weights"],
            gradient_norm=None,
            loss=loss,
            buffers=step["buffers"],
        )
        for step, loss in zip(plain["steps"], facts["losses"], strict=True)
    )
    return RankRecording(
        rank=facts["rank"],
        topology=Topology(**facts["topology"]),
        dtype=facts["dtype"],
        initial=plain["initial"],
        buffers=tuple(facts["buffers"]),
        layouts=layouts,
        steps=steps,
        inputs=tuple(plain["inputs"]),
        deviations=_deviations_from_plain(facts["deviations"]),
        versions=facts["versions"],
    )


def _deviations_as_plain(deviations: Mapping[Hashable, float] | None) -> list[Any] | None:
    if deviations is None:
        return None
    return [[[asdict(part) if isinstance(part, TensorKey) else part for part in key], value]  # type: ignore[attr-defined]
            for key, value in deviations.items()]  # fmt: skip


def _deviations_from_plain(plain: list[Any] | None) -> dict[Hashable, float] | None:
    if plain is None:
        return None
    return {tuple(TensorKey(**part) if isinstance(part, dict) else part for part in key): value for key, value in plain}
