"""The parts of a data loader, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_INNER_LOADER = ("base_dataloader", "dataloader", "loader", "_loader")  # accelerate; common wrappers
_INNER_SAMPLER = ("batch_sampler", "sampler")
_INNER_DATASET = ("dataset",)  # accelerate's IterableDatasetShard, torch's Subset
_DEEPEST = 8  # wrappers in wrappers; a cycle ends here


def torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the torch DataLoader that does the work inside `loader`, or None where there is none to be seen."""
    for _ in range(_DEEPEST):
        if issubclass(type(loader), DataLoader):  # type(): accelerate's wrappers say that they are DataLoaders
            return loader  # type: ignore[no-any-return]
        loader = next((vars_of(loader)[name] for name in _INNER_LOADER if name in vars_of(loader)), None)
    return None


def loaders(loader: Any) -> Iterator[Any]:
    """Yield `loader` and every loader inside it, from the outside in."""
    for _ in range(_DEEPEST):
        if loader is None:
            return
        yield loader
        if issubclass(type(loader), DataLoader):
            return
        loader = next((vars_of(loader)[name] for name in _INNER_LOADER if name in vars_of(loader)), None)


def samplers(loader: Any) -> Iterator[Any]:
    """Yield the samplers of a torch DataLoader from the outside in: batch samplers, their shards, the sampler."""
    both = (getattr(loader, name, None) for name in _INNER_SAMPLER)
    yield from _chain(next((sampler for sampler in both if sampler is not None), None), _INNER_SAMPLER)


def datasets(loader: Any) -> Iterator[Any]:
    """Yield the datasets of a loader from the outside in."""
    yield from _chain(getattr(loader, "dataset", None), _INNER_DATASET)


def vars_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object's own, without asking its `__getattr__`."""
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else {}


def _chain(value: Any, inner: tuple[str, ...]) -> Iterator[Any]:
    for _ in range(_DEEPEST):
        if value is None:
            return
        yield value
        value = next((held for name in inner if (held := getattr(value, name, None)) is not None), None)
