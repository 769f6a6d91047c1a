"""How outputs of modules lie in the whole ones, decided once in a recording where shapes leave several readings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.numerics.optimizer_view import Part
from tpcheck.numerics.optimizers.indices import index_of_dtensor, is_dtensor
from tpcheck.numerics.sketch import GlobalIndex
from tpcheck.runs.recording.activations import Place

OutputKey = tuple[str, str, int]  # module, path in its output, call

# Slots of the store in which a rank leaves its digests, by the step's number: a peer may read those of one step while
# this rank has come to the next.
_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Output:
    """What one rank says of an output in a step.

    Attributes:
        digest: Of its bits.
        is_uniform: Slices along a dim in which it may be cut are equal, so that its shards may be equal, too.
    """

    digest: str
    is_uniform: bool


class OutputPlaces:
    """Decides which reading of an output is kept: by its module's weight, or because all TP ranks have the same bits.

    A linear module's output is cut as the rows of its weight are, where a backend knows these. Any other output that is
    equal to the bit on all ranks of the TP group in a recorded step is a replica from the next one on. One that differs
    is a shard or a term of a sum, which nothing here can tell: it keeps all readings. Ranks leave digests in the store
    of the default process group and take what is there: nobody waits, and ranks may decide at different steps, as
    comparing takes the readings that all of them have.

    Attributes:
        contradicted: Outputs that were replicas and are none any more, with the first step in which they differed.
    """

    def __init__(self, weights: Mapping[str, Part], tp_group: Sequence[int], tp_rank: int, run: str) -> None:
        self.contradicted: dict[OutputKey, int] = {}
        self._weights = weights
        self._group = tuple(tp_group)
        self._tp_rank = tp_rank
        self._prefix = f"tpcheck/outputs/{run}/{self._group[0]}"
        self._rows: dict[Any, GlobalIndex | None] = {}
        self._is_replicated: dict[OutputKey, bool] = {}
        self._posted: dict[OutputKey, Output] | None = None
        self._step = -1

    # ---- by the weight

    def columns(self, module: nn.Module, name: str, args: Sequence[Any], output: torch.Tensor) -> GlobalIndex | None:
        """Return which columns of the whole output this one holds, by the module's weight; None where that is no guide.

        A guide is the weight of a module that takes as many columns as it has columns, and returns as many as it has
        rows. Modules other than torch's may hold it transposed, which only its shape tells. In its forward pass a
        module may hold more of it than it keeps, as under FSDP2 and ZeRO 3: only rows that are all of those count.
        """
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        weight = module._parameters.get("weight")
        if given is None or weight is None or not given.dim() or not output.dim() or not given.is_floating_point():
            return None
        shape = _local_shape(weight)
        if shape != (output.shape[-1], given.shape[-1]):
            return None
        if shape[0] == shape[1] and not isinstance(module, nn.Linear):
            return None
        rows = self._rows_of_weight(name, weight)
        return rows if rows is not None and rows.local_shape == shape[:1] else None

    def _rows_of_weight(self, name: str, weight: torch.Tensor) -> GlobalIndex | None:
        """Return which rows of the whole weight a module holds in its forward pass: of a DTensor by its placements."""
        key: Any = name
        if is_dtensor(weight):
            key = (weight.device_mesh, weight.placements, tuple(weight.shape))  # type: ignore[attr-defined]
        if key not in self._rows:
            self._rows[key] = None
            if is_dtensor(weight):
                mesh = set(weight.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
                index = index_of_dtensor(weight.detach()) if set(self._group) <= mesh else None
            else:
                part = self._weights.get(f"{name}.weight")
                index = None if part is None else part.index
            if index is not None and index.positions is None and len(index.shape) == 2:
                self._rows[key] = GlobalIndex(index.shape[:1], index.indices[:1])
        return self._rows[key]

    # ---- by digests

    def kept(self, key: OutputKey, places: tuple[Place, ...]) -> tuple[Place, ...]:
        """Return the places that an output is recorded at; the first of several takes the local tensor as all of it."""
        if not self._is_replicated.get(key):
            return places
        return tuple(place for place in places if place.label in (places[0].label, "positions"))

    def is_open(self, key: OutputKey) -> bool:
        """Return whether nothing has been decided of an output."""
        return key not in self._is_replicated

    def post(self, step: int, outputs: Mapping[OutputKey, Output]) -> None:
        """Leave this rank's digests of a recorded step for its peers: of outputs with several readings.

        Args:
            step: Number of the step.
            outputs: All of them that are not known to differ.
        """
        self._posted, self._step = dict(outputs), step
        if len(self._group) > 1:
            message = [step, [[*key, said.digest, said.is_uniform] for key, said in outputs.items()]]
            with suppress(RuntimeError):  # the rank that keeps the store is gone: the loop is to find that, not this
                dist.distributed_c10d._get_default_store().set(self._slot(self._tp_rank), json.dumps(message))

    def learn(self) -> None:
        """Decide by what all peers have left of the last recorded step; nothing where one of them has not yet."""
        if self._posted is None or len(self._group) == 1:
            return
        slots = [self._slot(rank) for rank in range(len(self._group))]
        found: list[Any] = []
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            if store.check(slots):
                found = [json.loads(store.get(slot)) for slot in slots]
        if not found or any(step != self._step for step, _ in found):
            return
        self.decide([{(name, path, call): Output(*said) for name, path, call, *said in each} for _, each in found])
        self._posted = None

    def decide(self, of_ranks: Sequence[Mapping[OutputKey, Output]]) -> None:
        """Decide by what all ranks of the TP group say of their outputs in the step that was posted last."""
        for key in self._posted or {}:
            if not self.may_be_replicated(key):
                continue
            said = [each.get(key) for each in of_ranks]
            known = [output for output in said if output is not None]
            are_equal = len(known) == len(said) and len({output.digest for output in known}) == 1
            if not are_equal:
                if self._is_replicated.get(key):
                    self.contradicted[key] = self._step
                self._is_replicated[key] = False
            elif not any(output.is_uniform for output in known):
                self._is_replicated[key] = True

    def may_be_replicated(self, key: OutputKey) -> bool:
        return self._is_replicated.get(key, True)

    def changed(self) -> dict[str, str]:
        """Return what is to be said of outputs that were replicas and are none any more; empty where there are none."""
        if not self.contradicted:
            return {}
        (name, path, call), step = next(iter(self.contradicted.items()))
        others = len(self.contradicted) - 1
        label = f"output of {name}" + (f" {path}" if path not in ("", "0") else "") + (f", call {call}" if call else "")
        reason = (
            f"the ranks of a TP group had equal values of it at first, and others in step {step}: from there on it is "
            "recorded both as replicas and as shards"
        )
        return {label + (f" and {others} more" if others else ""): reason}

    def _slot(self, tp_rank: int) -> str:
        return f"{self._prefix}/{tp_rank}/{self._step % _SLOTS}"


def is_uniform(tensor: torch.Tensor, places: Sequence[Place]) -> bool:
    """Return whether an output does not change along a dim in which one of its places cuts it."""
    dims = [int(place.label.removeprefix("dim ")) for place in places if place.label.startswith("dim ")]
    return any(bool((tensor == tensor[_first_along(dim)]).all()) for dim in dims)


def _first_along(dim: int) -> tuple[Any, ...]:
    return (..., slice(1)) if dim == -1 else (*(slice(None),) * dim, slice(1))


def _local_shape(weight: torch.Tensor) -> tuple[int, ...]:
    """Return the shape on this TP rank; ZeRO 3 has released the data when hooks see what a module returns."""
    return tuple(getattr(weight, "ds_shape", getattr(weight, "_local_tensor", weight).shape))
