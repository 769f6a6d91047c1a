"""What modules keep in attributes beside parameters and buffers: counters, caches, losses that a loop adds to its own.

A replay is a call that the loop has not made. It must find these as the recorded call did, and leave them as the loop
has them.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Parameters, buffers, modules and hooks are torch's, and others here put them back.
_NOT_KEPT = frozenset(vars(nn.Module())) - {"training"} | {"__getstate__"}
_COLLECTIONS = (list, dict, set, deque, OrderedDict, defaultdict)


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of the modules of a model at one time. Of lists, dicts and sets the items are kept, too.

    What is changed inside of nested collections or an object of another class is not seen.

    Attributes:
        values: For each module.
        items: Lists, dicts and sets among them, with a copy.
        tensors: Tensors without a graph in both, with a copy.
    """

    values: Sequence[tuple[nn.Module, dict[str, Any]]]
    items: Sequence[tuple[Any, Any]]
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        values = [(module, _own(module)) for module in model.modules()]
        collections = [value for _, own in values for value in own.values() if type(value) in _COLLECTIONS]
        kept = [value for _, own in values for value in own.values()]
        kept += [item for collection in collections for item in _values(collection)]
        tensors = {id(value): value for value in kept if _is_state(value)}
        return cls(
            values,
            [(value, value.copy()) for value in collections],
            [(value, value.detach().clone()) for value in tensors.values()],
        )

    def put_back(self) -> None:
        for module, values in self.values:
            attributes = vars(module)
            for name in _own(module).keys() - values.keys():
                del attributes[name]
            attributes.update(values)
        for value, items in self.items:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(items)
        for tensor, value in self.tensors:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)  # of which no graph that has saved the tensor knows

    def new_losses(self) -> dict[str, torch.Tensor]:
        """Return the losses that have come into attributes since, and into lists and dicts there."""
        return {path: holder[place] for path, holder, place in self._new_places()}

    def replace_by_views(self) -> dict[str, torch.Tensor]:
        """Put views in place of the new losses: their gradients are those that come from outside the model alone."""
        views = {}
        for path, holder, place in [*self._new_places()]:
            holder[place] = views[path] = holder[place].view_as(holder[place])
        return views

    def _new_places(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield what holds a new loss, and at which place, with a name that is the same in every call."""
        known = {id(each) for _, own in self.values for each in own.values()}
        known |= {id(each) for _, items in self.items for each in _values(items)}
        for number, (module, _) in enumerate(self.values):
            for name, value in _own(module).items():
                path = f"attribute {number} {name}"
                if _is_loss(value) and id(value) not in known:
                    yield path, vars(module), name
                elif isinstance(value, (list, dict)):
                    for place, item in value.items() if isinstance(value, dict) else enumerate(value):
                        if _is_loss(item) and id(item) not in known:
                            yield f"{path} {place}", value, place


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _NOT_KEPT}


def _values(items: Any) -> Any:
    return items.values() if isinstance(items, dict) else items


def _is_loss(value: Any) -> bool:
    """Return whether a value may be a loss. The loop may take gradients by any other, or keep them: no view does."""
    is_inner = isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf
    return is_inner and value.dim() == 0 and not value.retains_grad


def _is_state(value: Any) -> bool:
    """Return whether a value is a tensor that forward passes may change in place, such as a running mean."""
    return type(value) is torch.Tensor and not value.requires_grad and value.layout is torch.strided
