"""Whether a vector of equal elements is a replica over TP, read off what its module returns in the first call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpcheck.core.digests import digest
from tpcheck.core.module_hooks import HiddenHooks
from tpcheck.numerics.optimizers.names import unwrapped_name
from tpcheck.numerics.recorder import eager
from tpcheck.numerics.tensors import named_tensors

# Mean squares of rows that a norm returns, relatively: equal but for its epsilon and for rounding to bfloat16, 2^-9 of
# each element. Those of rows that vary do so by sqrt(2 / width), 2 % at a width of 4096, and over some rows by more.
_EQUAL_ROWS, _UNLIKE_ROWS = 5e-3, 2e-2
_FEWEST_ROWS, _NARROWEST = 3, 4
_MOST_ROWS = 256  # that are looked at


@dataclass(frozen=True, slots=True)
class SeenOutput:
    """What a module returned in a call.

    Attributes:
        digest: Of its output; empty where its columns are all equal, so that shards of it may be, too.
        is_norm: Each of its rows was divided by a statistic over all of that row.
    """

    digest: str
    is_norm: bool


class FirstOutputs:
    """Sees, in one call of the model, the first output of modules that have vectors of unknown layout.

    Attributes:
        seen: By name of the parameter: vectors that have as many elements as the output has columns, of modules with no
            more than one matrix, so that a vector goes with the output's columns.
    """

    def __init__(self, root: nn.Module, names: Collection[str]) -> None:
        self.seen: dict[str, SeenOutput] = {}
        self._handles = HiddenHooks()
        is_compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in root.modules())
        for path, module in root.named_modules():
            vectors = {
                unwrapped_name(f"{path}.{name}" if path else name): parameter
                for name, parameter in module.named_parameters(recurse=False)
            }
            unknown = {name: each.numel() for name, each in vectors.items() if name in names and each.dim() == 1}
            num_matrices = sum(parameter.dim() > 1 for parameter in module.parameters())
            if unknown and num_matrices <= 1 and not is_compiled:  # a hook would make compiled code be compiled again
                handle = module.register_forward_hook(eager(self._after(unknown, is_alone=not num_matrices)))
                self._handles.add(module, handle)

    def remove(self) -> None:
        self._handles.remove()

    def _after(self, vectors: Mapping[str, int], *, is_alone: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found = [tensor.detach() for _, tensor in named_tensors(output) if tensor.is_floating_point()]
            if not found or vectors.keys() <= self.seen.keys() or hasattr(found[0], "placements"):
                return
            columns = found[0].shape[-1] if found[0].dim() else 0
            fitting = [name for name, size in vectors.items() if size == columns > 1]
            if fitting:
                given = args[0].detach() if args and isinstance(args[0], torch.Tensor) else None
                is_uniform = bool((found[0] == found[0][..., :1]).all())
                is_norm = is_alone and given is not None and divides_by_a_statistic(given, found[0])
                said = SeenOutput("" if is_uniform else digest(found[0]), is_norm)
                self.seen.update(dict.fromkeys(fitting, said))

        return hook


def divides_by_a_statistic(given: torch.Tensor, output: torch.Tensor) -> bool:
    """Return whether rows of unlike mean square, or variance where a mean was taken away, were given equal ones.

    A norm with a weight of equal elements does that, and nothing that scales every row by the same. Were a row a shard,
    divided by a statistic of all shards, its own mean square would vary.
    """
    if given.shape != output.shape or output.shape[-1] < _NARROWEST or not given.is_floating_point():
        return False
    before, after = (each.reshape(-1, each.shape[-1])[:_MOST_ROWS].detach().double() for each in (given, output))
    if bool(after.mean(-1).abs().max() <= _EQUAL_ROWS * after.abs().max()):
        before = before - before.mean(-1, keepdim=True)
    squares_before, squares_after = before.square().mean(-1), after.square().mean(-1)
    is_padding = (squares_before == 0) | (squares_after == 0)
    if int((~is_padding).sum()) < _FEWEST_ROWS:
        return False
    is_equal = _spread(squares_after[~is_padding]) <= _EQUAL_ROWS
    return is_equal and _spread(squares_before[~is_padding]) >= _UNLIKE_ROWS


def _spread(squares: torch.Tensor) -> float:
    return float((squares.max() - squares.min()) / squares.mean())
