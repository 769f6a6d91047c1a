"""Whose error it is: that of the system under test, or of tpcheck's own hooks and checks, which run inside it."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tpcheck
from tpcheck.backends.interface import Backend
from tpcheck.core.errors import BackendError, InternalError, TpcheckError
from tpcheck.core.topology import Topology
from tpcheck.numerics.evidence import Collective, TensorKey
from tpcheck.numerics.recorder import CollectiveLog
from tpcheck.world.failures import is_communication

_TPCHECK, _TORCH = Path(tpcheck.__file__).parent, Path(torch.__file__).parent
# Backends call the libraries that are under test, and faults are bugs on purpose.
_UNDER_TEST = (_TPCHECK / "backends", _TPCHECK / "lab")
# From here torch calls a module, or an operation of the graph: what follows is the model's.
_CALLS_THE_MODEL = (_TORCH / "nn" / "modules", _TORCH / "autograd", _TORCH / "_dynamo")
_STANDARD_LIBRARY = Path(traceback.__file__).parent
_PASSES_ON = ("__torch_function__", "__torch_dispatch__")  # every operation of the model goes through these


@contextmanager
def blame_backend(backend: Backend, phase: str, hint: str = "", *, model: nn.Module | None = None) -> Iterator[None]:
    """Raise errors from inside as BackendError, with phase, place and a hint; tpcheck's own as InternalError.

    Args:
        model: What runs inside: the module at which it crashes is named.
    """
    try:
        yield
    except TpcheckError:
        raise
    except (Exception, SystemExit) as error:
        if is_of_tpcheck(error):
            raise internal_error(error) from error
        message = f"{backend.name}, {phase}: {type(error).__name__}: {_without_tensors(error)}"
        raise BackendError("\n".join(filter(None, [message, _place_of_error(error, model), hint]))) from error


def _place_of_error(error: BaseException, model: nn.Module | None) -> str:
    """Return the module of a model that ran when an error was raised, and the innermost line outside of libraries."""
    names = {id(module): name for name, module in (() if model is None else model.named_modules())}
    modules, lines = [], []
    for frame, line in traceback.walk_tb(error.__traceback__):
        code, running = frame.f_code, frame.f_locals.get("self")
        if isinstance(running, nn.Module) and names.get(id(running)):
            modules.append(f"in {names[id(running)]} ({type(running).__name__})")
        if _is_under_test(Path(code.co_filename)):
            lines.append(f"at {code.co_filename}:{line}, in {code.co_name}")
    return ", ".join([*modules[-1:], *lines[-1:]])


def _without_tensors(error: BaseException) -> str:
    """Return the text of an error, with the shapes of tensors in place of their numbers.

    Example:
        >>> _without_tensors(KeyError(torch.zeros(8, 4)))
        'a tensor of shape (8, 4), torch.float32'
    """
    if not any(isinstance(value, torch.Tensor) for value in error.args):
        return str(error)
    texts = [
        f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, torch.Tensor) else str(value)
        for value in error.args
    ]
    return ", ".join(texts)


def is_of_tpcheck(error: BaseException) -> bool:
    """Return whether tpcheck raised an error, by the innermost frames: torch raises for whoever called it."""
    if isinstance(error, (TpcheckError, MemoryError, torch.OutOfMemoryError)) or is_communication(error):
        return False
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename)
        if frame.f_code.co_name in _PASSES_ON:
            continue
        if _is_under_test(path) or any(path.is_relative_to(folder) for folder in _CALLS_THE_MODEL):
            return False
        if path.is_relative_to(_TPCHECK):
            return True
    return False


def _is_under_test(path: Path) -> bool:
    """Return whether a file is of the system under test: not tpcheck's own, nor torch's, nor Python's."""
    if path.is_relative_to(_TPCHECK):
        return any(path.is_relative_to(folder) for folder in _UNDER_TEST)
    return not path.is_relative_to(_TORCH) and path.exists() and not _is_of_python(path)


def _is_of_python(path: Path) -> bool:
    """Return whether a file is of the standard library, in whose folder packages may be installed, too.

    `typing_extensions` is what later versions of it have: torch wraps what is deprecated in it.
    """
    if path.name == "typing_extensions.py":
        return True
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return path.is_relative_to(_STANDARD_LIBRARY) and not is_installed


def internal_error(error: BaseException) -> InternalError:
    """Return the error that says so, with the traceback."""
    return InternalError("".join(traceback.format_exception(error)).rstrip())


# ---- sizes that the TP group does not divide

_SIZES = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads",
    "intermediate_size": "neurons of the MLP (intermediate_size)",
    "moe_intermediate_size": "neurons of an expert (moe_intermediate_size)",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "n_routed_experts": "experts",
    "vocab_size": "tokens of the vocabulary",
}


def indivisible_sizes(config: Any, tp: int) -> str:
    """Return the sizes of a transformers configuration that cannot be cut evenly: `2 key-value heads over 4 ranks`."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = ((getattr(text, name, None), noun) for name, noun in _SIZES.items())
    uneven = (f"{size} {noun} over {tp} ranks" for size, noun in sizes if isinstance(size, int) and size % tp)
    return ", ".join(dict.fromkeys(uneven))


@contextmanager
def naming_indivisible_sizes(config: Any, tp: int) -> Iterator[None]:
    """Add the sizes that the TP group does not divide to the message of a backend that crashes."""
    try:
        yield
    except BackendError as error:
        uneven = indivisible_sizes(config, tp)
        if not uneven:
            raise
        raise BackendError(f"{error}\nNot divisible: {uneven}. Choose a tp that divides these.") from error


# ---- ranks that issue other collectives than the others


@dataclass(frozen=True, slots=True)
class IssuedCollective:
    """A collective in a form that is the same on ranks that do the same.

    Attributes:
        name: As in `torch.distributed`.
        over: The axis of its group, or its ranks.
        place: The module whose forward issued it, or the backward pass, as a phrase.
        position: How far the rank had come: how many activations it had recorded.
        after: The last one of those, as a phrase, in a backward pass: experts may compute on some ranks alone.
    """

    name: str
    over: str
    place: str
    position: int = field(default=0, compare=False)
    after: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.name} over {self.over} in {self.place}" + (f" after {self.after}" if self.after else "")


Issued = tuple[IssuedCollective, ...]


@dataclass(frozen=True, slots=True)
class RankProgress:
    """How far a rank had come when a run ended, comparable between ranks.

    Attributes:
        issued: Its collectives, in order.
        num_before: How many of them it had issued before the last pass.
        gradients: The activations whose gradients the last pass has computed, in order.
        is_in_pass: Whether that pass has not ended.
    """

    issued: Issued
    num_before: int = 0
    gradients: tuple[TensorKey, ...] = ()
    is_in_pass: bool = False


def progress_of(log: CollectiveLog, topology: Topology, rank: int) -> RankProgress:
    """Return what a rank has done so far."""
    return RankProgress(issued_by(log.issued, topology, rank), log.num_before, log.gradients, log.is_in_pass)


def issued_by(collectives: Sequence[Collective], topology: Topology, rank: int) -> Issued:
    """Return a rank's collectives, comparable between ranks."""
    axes = {topology.peers(rank, axis): axis for axis in ("dp", "tp")}
    return tuple(
        IssuedCollective(
            each.name,
            axes.get(tuple(sorted(each.ranks)), f"ranks {list(each.ranks)}"),
            _place(each),
            each.position,
            "" if each.phase == "forward" or each.after is None else _name(each.after),
        )
        for each in collectives
    )


def _place(collective: Collective) -> str:
    if collective.phase == "backward":
        return "the backward pass"
    return f"the forward of {collective.module or 'the model'}"


def _name(key: TensorKey) -> str:
    return f"{'the gradient of ' if key.phase == 'backward' else ''}{key.place}"


def explain_parting(progress: Mapping[int, RankProgress], groups: Iterable[Sequence[int]]) -> str | None:
    """Return what some ranks of a group have issued, and others of it have not; None where all have issued the same.

    Args:
        progress: Of the ranks that have reported it.
        groups: Of global ranks; the first one whose ranks differ is explained.
    """
    for of_group in _by_group(progress, groups):
        issued = {rank: each.issued for rank, each in of_group.items()}
        if first_unlike(issued) is not None:
            with_places = {rank: _with_places(each) for rank, each in of_group.items()}
            return ". ".join(filter(None, [first_unlike(with_places), _lost_gradient(of_group)]))
    return None


def explain_tensors(progress: Mapping[int, RankProgress], groups: Iterable[Sequence[int]]) -> str | None:
    """Return in which collective the ranks of a group have parted that have issued the same; None where in none."""
    for of_group in _by_group(progress, groups):
        last = {each.issued[-1:] for each in of_group.values()}
        if (
            len(of_group) > 1
            and len(last) == 1
            and all(each.is_in_pass for each in of_group.values())
            and (issued := last.pop())
        ):
            return f"{_ranks(list(of_group))} issued the {issued[0]} with tensors that do not fit each other"
    return None


def _by_group(progress: Mapping[int, RankProgress], groups: Iterable[Sequence[int]]) -> list[dict[int, RankProgress]]:
    return [{rank: progress[rank] for rank in group if rank in progress} for group in groups]


def _with_places(progress: RankProgress) -> Issued:
    """Return a rank's collectives such that those of the last pass differ where they come after other activations."""
    before, number = progress.issued[: progress.num_before], progress.num_before
    return (
        *before,
        *(
            replace(each, place=f"{each.place} after {each.after}", after="") if each.after else each
            for each in progress.issued[number:]
        ),
    )


def _lost_gradient(progress: Mapping[int, RankProgress]) -> str | None:
    """Return a sentence on the first activation whose gradient some ranks compute, and others pass by."""
    for of_rank in progress.values():
        for other, of_other in progress.items():
            known = {key: number for number, key in enumerate(of_other.gradients)}
            for number, key in enumerate(of_rank.gradients):
                is_past = not of_other.is_in_pass or any(later in known for later in of_rank.gradients[number + 1 :])
                if key not in known and is_past and of_other.gradients:
                    return f"No gradient comes back to {key.place} on rank {other}"
    return None


def first_unlike(issued_by_rank: Mapping[int, Issued]) -> str | None:
    """Return a sentence on the first collective that some ranks issue and others do not, if there is one.

    What most ranks issue is taken for right; of two ranks, that which issues one more, or is not as far and waits.

    Example:
        >>> down = IssuedCollective("all_reduce", "tp", "the forward of down")
        >>> loss = IssuedCollective("all_reduce", "tp", "the forward of the model")
        >>> first_unlike({0: (down, loss), 1: (loss,)})
        'rank 1 did not issue the all_reduce over tp in the forward of down that rank 0 issued'
    """
    longest = max(map(len, issued_by_rank.values()), default=0)
    for number in range(longest):
        entries = {rank: issued[number : number + 1] for rank, issued in issued_by_rank.items()}
        if len(set(entries.values())) == 1:
            continue
        counts = Counter(entries.values())

        order = {
            rank: (counts[entry], len(issued_by_rank[rank]), -entry[0].position if entry else 0, -rank)
            for rank, entry in entries.items()
        }
        right = max(order, key=order.__getitem__)
        wrong = [rank for rank in issued_by_rank if entries[rank] != entries[right]]
        right_ranks = [rank for rank in issued_by_rank if entries[rank] == entries[right]]
        return _unlike(number, right, wrong, right_ranks, issued_by_rank)
    return None


def _unlike(
    number: int, right: int, wrong: Sequence[int], right_ranks: Sequence[int], issued_by_rank: Mapping[int, Issued]
) -> str:
    expected, actual = issued_by_rank[right][number:], issued_by_rank[wrong[0]][number:]
    who, others = _ranks(wrong), _ranks(right_ranks)
    if not expected or actual[1:2] == expected[:1]:  # one more than the others
        return f"{who} issued an {actual[0]}, which {others} did not issue"
    left_out = f"{who} did not issue the {expected[0]} that {others} issued"
    if not actual or actual[:1] == expected[1:2]:
        return left_out
    if actual[0].position > expected[0].position:  # the others still wait
        return f"{left_out}, and went on to an {actual[0]}"
    return f"{who} issued an {actual[0]} where {others} issued an {expected[0]}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
