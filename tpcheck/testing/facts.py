"""What a candidate must be beside right: named as the reference, handing out copies, of one mind on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.adapters import Backend, Candidate, TrainingOptions, load_backend
from tpcheck.topology import Topology


def unmet_facts(
    rank: Any, backend: str | Backend, build: Callable[[], nn.Module], config: Mapping[str, Any]
) -> list[str]:
    """Return what this rank's candidate does not keep to, in words. Collective over the world."""
    loaded = load_backend(backend)

    def rebuild() -> nn.Module:
        torch.manual_seed(0)
        return build().to(rank.device)

    options = loaded.resolved(TrainingOptions(dtype=torch.float32, config=config, rebuild=rebuild))
    with loaded.session(options):
        model = rebuild()
        names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        candidate = loaded.shard(model, rank, options)
        told = {name: _description(layout) for name, layout in candidate.layouts().items()}
        unmet = [
            *_wrong_identity(loaded),
            *_wrong_names(candidate, names),
            *_wrong_shapes(candidate, names, rank.topology, rank.rank),
            *_no_copies(candidate, names),
        ]
        everyone: tuple[Any, ...] = rank.gather(told)
        if any(everyone[peer] != told for peer in rank.topology.peers(rank.rank, "tp")):
            unmet.append("the ranks of a TP group tell different layouts")
    return unmet


def _wrong_identity(backend: Backend) -> Iterator[str]:
    if not isinstance(backend.name, str) or not backend.name:
        yield "the backend has no name"
    if not all(isinstance(text, str) for item in backend.versions().items() for text in item):
        yield "versions() is not a mapping of names to texts"


def _wrong_names(candidate: Candidate, names: Mapping[str, Any]) -> Iterator[str]:
    known = dict(candidate.module.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in known:
            yield f"{name} of the reference is no parameter of candidate.module"


def _wrong_shapes(
    candidate: Candidate, names: Mapping[str, tuple[int, ...]], topology: Topology, rank: int
) -> Iterator[str]:
    layouts = candidate.layouts()
    tp_rank = topology.coordinate(rank)["tp"]
    for name, shape in names.items():
        if name not in layouts:
            continue
        layout = layouts[name]
        held = tuple(candidate.parameter(name).shape)
        if layout.shape != shape:
            yield f"the layout of {name} is of a tensor of shape {layout.shape}, not {shape}"
        if layout.local_shapes[tp_rank] != held:
            yield f"parameter({name!r}) has the shape {held}, and its layout says {layout.local_shapes[tp_rank]}"


def _no_copies(candidate: Candidate, names: Mapping[str, Any]) -> Iterator[str]:
    name = next(iter(names))
    before = candidate.parameter(name)
    kept = before.detach().clone()
    before.data.add_(1)
    if not torch.equal(candidate.parameter(name), kept):
        yield f"parameter({name!r}) is no copy"
    if type(before) is not torch.Tensor:
        yield f"parameter({name!r}) is a {type(before).__name__}, not a plain tensor"


def _description(layout: Any) -> tuple[Any, ...]:
    source = None if layout.source is None else tuple(layout.source.tolist())
    return layout.shape, layout.local_shapes, source
