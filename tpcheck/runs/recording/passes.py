"""Records one step of a loop: what every module computes in each call of the model, summed as sketches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import xxhash
from torch import nn

from tpcheck.core.cuda import uses_cuda
from tpcheck.core.digests import BlockDigest, digest, start_digests
from tpcheck.core.module_hooks import HiddenHooks
from tpcheck.numerics.recorder import eager
from tpcheck.numerics.sketch import GlobalIndex, PendingSketch, fetch_sketches, start_sketch
from tpcheck.numerics.tensors import map_tensors, named_tensors
from tpcheck.runs.recording.activations import ActivationPlaces, BatchShape, Place, SlicedPlaces, batch_among
from tpcheck.runs.recording.output_places import Output, OutputKey, OutputPlaces, is_uniform
from tpcheck.runs.recording.slices import ContextGroup, SlicedCall, digests_of_pieces, positions_among
from tpcheck.runs.trace.records import Kind, Leaf, PassRecord, Reading, TensorRecord

Key = tuple[Kind, str, str, int]  # kind, name, part, call: as `TensorRecord.key`

_HEAD = 1024  # elements whose digest says whether a tensor may be known

_is_repeating: ContextVar[bool] = ContextVar("is_repeating", default=False)
_NO_BACKWARD = -1  # autograd's number of a backward pass where there is none
_backward_around: ContextVar[int] = ContextVar("backward_around", default=_NO_BACKWARD)


@dataclass(slots=True)
class KnownSketches:
    """Sketches of unscaled tensors on the CPU, by their bits and by where they lie.

    A module returns what its last one has returned (mlp and down_proj), and a residual hands its gradient on: a sketch
    costs three times as much as the digest that finds it. A tensor that starts with new bits is none of the known ones:
    its digest is then taken in the pass that its sketch takes. On another device digests are not known without a wait.

    Attributes:
        sketches: By digest, dtype, shape and place.
        heads: Digests of the first elements of their tensors.
    """

    sketches: dict[tuple[Any, ...], PendingSketch] = field(default_factory=dict)
    heads: set[bytes] = field(default_factory=set)

    def may_have(self, tensor: torch.Tensor) -> bool:
        """Return whether the sketch of this tensor may be known; from here on it is one of those that may be."""
        if not tensor.is_contiguous():
            return True
        head = start_digests([tensor.reshape(-1)[:_HEAD]])()[0]
        is_known = head in self.heads
        self.heads.add(head)
        return is_known

    def clear(self) -> None:
        self.sketches.clear()
        self.heads.clear()


@dataclass(slots=True)
class PendingTensor:
    """A tensor of a step whose sketches are still on its device; terms of several micro-batches are added.

    Attributes:
        key: As `TensorRecord.key`.
        dtype, shape: Of the local part.
        places: How it may lie in the whole.
        sketches: One for each place.
        digests: Functions that wait for the digest of each term.
        full: Copies of the terms, where whole tensors are kept.
    """

    key: Key
    dtype: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    sketches: list[PendingSketch]
    digests: list[Callable[[], Sequence[bytes]]]
    full: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        key: Key,
        tensor: torch.Tensor,
        places: tuple[Place, ...],
        *,
        scale: float = 1.0,
        is_full: bool = False,
        known: KnownSketches | None = None,
    ) -> PendingTensor:
        """Start the sketches and the digest of a plain local tensor.

        Args:
            known: Sketches; those with these bits and places are taken, and others added.
        """
        if tensor.is_cpu:
            sketches, bits = _sketches_on_cpu(tensor, places, scale, known)
            wait: Callable[[], Sequence[bytes]] = partial(tuple, [bits])
        else:
            wait = start_digests([tensor])
            sketches = [start_sketch(tensor, place.index, rows=place.rows, scale=scale) for place in places]
        return cls(
            key,
            _dtype(tensor),
            tuple(tensor.shape),
            places,
            sketches,
            [wait],
            [(tensor.detach() * scale if scale != 1.0 else tensor.detach()).to("cpu", copy=True)] if is_full else [],
        )

    @classmethod
    def whole(cls, key: Key, tensor: torch.Tensor) -> PendingTensor:
        """Start the sketch of a tensor that is taken as it is, wherever it lies in the whole."""
        shape = tuple(tensor.shape)
        return cls.of(key, tensor, (Place("whole", shape, "all", GlobalIndex.whole(shape)),))

    def add(self, term: PendingTensor) -> None:
        """Add the same tensor of another micro-batch, or of another backward pass."""
        self.digests += term.digests
        self.full += term.full
        if [place.shape for place in self.places] != [place.shape for place in term.places]:
            self.places, self.sketches = (), []
            return
        self.sketches = [mine.add(other) for mine, other in zip(self.sketches, term.sketches, strict=True)]

    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(b"".join(bits for wait in self.digests for bits in wait()))


def _sketches_on_cpu(
    tensor: torch.Tensor, places: tuple[Place, ...], scale: float, known: KnownSketches | None
) -> tuple[list[PendingSketch], bytes]:
    """Return the sketch for each place and the digest of a tensor, which is read once unless it may be known."""
    digest = BlockDigest(tensor)
    sketches: dict[Any, PendingSketch] = {} if known is None else known.sketches
    first = None
    if places and (known is None or not known.may_have(tensor)):
        first = start_sketch(tensor, places[0].index, rows=places[0].rows, scale=scale, digest=digest)
    bits = digest.digest()
    found = []
    for number, place in enumerate(places):
        in_pass = (bits, tensor.dtype, tensor.shape, place.shape, place.piece, place.rows, place.order)
        content = number if known is None else in_pass
        if first is not None:
            sketches[content], first = first, None
        elif content not in sketches:
            sketches[content] = start_sketch(tensor, place.index, rows=place.rows, scale=scale)
        found.append(sketches[content])
    return found, bits


def finished(
    tensors: Iterable[PendingTensor],
    *,
    num_passes: int = 1,
    deviations: Mapping[Key, Sequence[float]] | None = None,
) -> tuple[TensorRecord, ...]:
    """Wait for all sketches at once and return the records.

    Args:
        tensors: In the order of events.
        num_passes: Outputs whose rows are not those of samples are averaged over so many micro-batches.
        deviations: For each place of a tensor, how far rounding moves it.
    """
    pending = list(tensors)
    sketches = iter(fetch_sketches([sketch for tensor in pending for sketch in tensor.sketches]))
    records = []
    for tensor in pending:
        measured = (deviations or {}).get(tensor.key)
        readings = []
        for number, place in enumerate(tensor.places):
            sketch = next(sketches)
            if num_passes > 1 and place.rows is None and tensor.key[0] == "output":
                sketch = sketch.scaled(1 / num_passes)
            deviation = None if measured is None else measured[min(number, len(measured) - 1)]
            readings.append(
                Reading(place.label, place.shape, place.piece, sketch, place.is_term, deviation, place.order)
            )
        records.append(
            TensorRecord(
                *tensor.key, tensor.dtype, tensor.shape, tensor.digest(), tuple(readings), full=tuple(tensor.full)
            )
        )
    return tuple(records)


@dataclass(slots=True, eq=False)
class Pass:
    """One call of the model, with what it computed so far.

    Attributes:
        args, kwargs: What the model was called with.
        leaves: Their tensors, by place in the arguments: dtype, shape, and a function that waits for the digest.
        places: Finds how outputs lie in the whole.
        is_training: `model.training`.
        generators, generators_after: Digests of the states of the generators before the call, and after it.
        autocast: The dtype of autocast on the model's device; empty without.
        tensors: What was computed, by key.
        loss: The loss that the model returned, still on its device.
        has_backward: Whether a backward pass has reached any output.
        has_second_derivatives: Whether one of them makes a graph of its own, to be differentiated again.
        calls: Number of calls of each module.
        unmatched: For modules whose outputs had no autograd graph: calls that a recomputation may still follow.
        from_indices: Leaf modules that were called with indices: their outputs lie as the model's arguments do.
        seeds: Gradients that reached the model's own outputs from outside, by path; for replays.
        before: Whatever a replay needs of the time before the call.
        decided: Which of several places of an output are kept; None keeps all.
        outputs: Where each output that is no DTensor lies, with its shape: its gradient lies there, too.
        known: Sketches of this call's tensors, which others may have to the bit.
        pieces: Digests of the pieces of each sample, [B, pieces]; None where there are no positions.
        positions: As in `SlicedCall`.
        uniform: For outputs with several places that may be replicas, whether they are uniform along a cut.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: dict[str, tuple[str, tuple[int, ...], Callable[[], Sequence[bytes]]]]
    places: ActivationPlaces | SlicedPlaces
    is_training: bool
    generators: Mapping[str, str]
    generators_after: Mapping[str, str] = field(default_factory=dict)
    autocast: str = ""
    tensors: dict[Key, PendingTensor] = field(default_factory=dict)
    loss: torch.Tensor | None = None
    has_backward: bool = False
    has_second_derivatives: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    open_calls: dict[str, list[int]] = field(default_factory=dict)
    unmatched: dict[str, list[int]] = field(default_factory=dict)
    from_indices: set[str] = field(default_factory=set)
    seeds: dict[str, torch.Tensor] = field(default_factory=dict)
    before: Any = None
    decided: OutputPlaces | None = None
    outputs: dict[OutputKey, tuple[torch.Size, tuple[Place, ...]]] = field(default_factory=dict)
    uniform: dict[OutputKey, bool] = field(default_factory=dict)
    known: KnownSketches = field(default_factory=KnownSketches)
    pieces: torch.Tensor | None = None
    positions: str = ""

    @classmethod
    def start(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tp: int,
        tp_rank: int,
        decided: OutputPlaces | None = None,
        context: ContextGroup | None = None,
    ) -> Pass:
        """Return the record of a call that is about to start; collective over the ranks of `context`."""
        named = [(path, local_values(tensor)) for path, tensor in named_tensors((*args, kwargs) if kwargs else args)]
        leaves = {
            path.removeprefix(f"{len(args)}."): (_dtype(leaf), tuple(leaf.shape), start_digests([leaf.detach()]))
            for path, leaf in named
        }
        is_sequence_first = any(type(module).__module__.startswith("megatron.core.") for module in model.modules())
        batch = BatchShape.of([leaf.detach() for _, leaf in named])
        places: Any = ActivationPlaces(batch, tp, tp_rank, is_sequence_first=is_sequence_first)
        leaf, has_positions = batch_among(leaf for _, leaf in named)
        leaf = leaf if has_positions else None
        sliced = SlicedCall()
        if context is not None:
            positions = positions_among(
                model, [(path.removeprefix(f"{len(args)}."), each) for path, each in named], leaf
            )
            sliced = context.slices(leaf, positions)
            places = SlicedPlaces.of(sliced.slices, places)
        pieces = digests_of_pieces(leaf, 1 if context is None else context.size)
        device = next(model.parameters()).device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
        autocast = autocast.removeprefix("torch.")
        recorded = cls(
            args, kwargs, leaves, places, model.training, generator_digests(), autocast=autocast, decided=decided
        )
        recorded.pieces, recorded.positions = pieces, sliced.positions
        return recorded

    @classmethod
    def like(cls, recorded: Pass) -> Pass:
        """Return the record of a repetition of a call."""
        return cls((), {}, {}, recorded.places, recorded.is_training, {}, decided=recorded.decided)

    def add(self, key: Key, tensor: torch.Tensor, *, columns: GlobalIndex | None = None, is_full: bool = False) -> None:
        """Add a tensor of this call; one that is there already is added up.

        Args:
            columns: Which of the whole output's columns it has, where that is known.
        """
        places = self._places_of(key, tensor, columns)
        pending = PendingTensor.of(key, local_values(tensor), places, is_full=is_full, known=self.known)
        if key in self.tensors:
            self.tensors[key].add(pending)
        else:
            self.tensors[key] = pending

    def _places_of(self, key: Key, tensor: torch.Tensor, columns: GlobalIndex | None) -> tuple[Place, ...]:
        kind, output = key[0], key[1:]
        lies_as_inputs = not key[1] or key[1] in self.from_indices
        if _is_dtensor(tensor):
            return self.places.places_of_dtensor(tensor, lies_as_inputs=lies_as_inputs)
        if kind == "output_gradient" and output in self.outputs and self.outputs[output][0] == tensor.shape:
            return self.outputs[output][1]
        places = self.places.places(tensor, lies_as_inputs=lies_as_inputs, known=columns)
        if kind == "output":
            if len(places) > 1 and self.decided is not None and self.decided.may_be_replicated(output):
                is_open = self.decided.is_open(output)
                self.uniform[output] = is_open and (self.uniform.get(output, False) or is_uniform(tensor, places))
                places = self.decided.kept(output, places)
            self.outputs[output] = (tensor.shape, places)
        return places

    def forget(self) -> None:
        """Let go of what was recorded, once it is written: hooks in the loop's graphs keep the pass until these go."""
        self.tensors.clear()
        self.known.clear()
        self.outputs.clear()
        self.seeds.clear()
        self.args, self.kwargs, self.before = (), {}, None

    def record(self) -> PassRecord:
        by_order = self.places.by_order if isinstance(self.places, SlicedPlaces) else {}
        return PassRecord(
            tuple(
                Leaf(name, dtype, shape, xxhash.xxh3_128_hexdigest(f"{dtype} {shape}".encode() + wait()[0]))
                for name, (dtype, shape, wait) in self.leaves.items()
            ),
            _as_text(self.places.batch.samples),
            None if self.loss is None else float(self.loss),
            self.has_backward,
            self.is_training,
            self.generators,
            self.generators_after,
            {order: _as_text(places.batch.samples) for order, places in by_order.items()},
            () if self.pieces is None else tuple(map(_joined, self.pieces.tolist())),
            self.positions,
        )


def _as_text(samples: torch.Tensor | None) -> tuple[str, ...]:
    return () if samples is None else tuple(f"{key & (1 << 64) - 1:016x}" for key in samples.tolist())


def _joined(keys: Sequence[int]) -> str:
    return "".join(f"{key >> 32 & (1 << 32) - 1:08x}" for key in keys)


def merged(passes: Iterable[Pass]) -> list[PendingTensor]:
    """Return the tensors of all micro-batches, summed by key, in the order of events: first outputs, then gradients."""
    sums: dict[Key, PendingTensor] = {}
    for each in passes:
        for key, tensor in each.tensors.items():
            if key in sums:
                sums[key].add(tensor)
            else:
                sums[key] = tensor
    return sorted(sums.values(), key=lambda tensor: tensor.key[0].endswith("gradient"))


def joined_digests(passes: Sequence[Pass]) -> dict[Key, str]:
    """Return the digests that the records of these micro-batches will have, in the order of events of each."""
    waiting: dict[Key, list[Callable[[], Sequence[bytes]]]] = {}
    for each in passes:
        for key, tensor in each.tensors.items():
            waiting.setdefault(key, []).extend(tensor.digests)
    return {
        key: xxhash.xxh3_128_hexdigest(b"".join(bits for wait in waits for bits in wait()))
        for key, waits in waiting.items()
    }


def replica_candidates(passes: Sequence[Pass]) -> dict[OutputKey, Output]:
    """Return the outputs of these micro-batches that may be replicas over TP, for `OutputPlaces.post`."""
    keys = dict.fromkeys(key for each in passes for key in each.uniform)
    found = {key: any(each.uniform.get(key, False) for each in passes) for key in keys}
    digests = {key[1:]: digest for key, digest in joined_digests(passes).items() if key[0] == "output"}
    return {key: Output(digests[key], uniform) for key, uniform in found.items()}


def generator_digests() -> dict[str, str]:
    """Return digests of the states of torch's default generators."""
    states = {"torch": torch.get_rng_state()}
    if uses_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: digest(state) for name, state in states.items()}


class ModuleHooks:
    """Hooks on the modules of a model, which pass what they return, and its gradient, to the current pass.

    The model itself has none: whoever calls it hands its output over, which has to be seen after all other hooks. What
    a module returns is not replaced and not copied. Copies of the model (an average of its weights) have no hooks, or
    ones that do nothing there. Under activation checkpointing, the first computation gives the outputs; where that
    had no autograd graph, the recomputation gives the gradients.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        current: Callable[[], Pass | None],
        live: Callable[[], Sequence[Pass]],
        *,
        is_full: bool,
    ) -> None:
        self._current = current
        self._live = live
        self._is_full = is_full
        self._handles = HiddenHooks()
        self._records_root = "" in names.values()
        for module, name in names.items():
            if not name:
                continue
            before, after = (eager(hook) for hook in (self._before(module, name), self._after(module, name)))
            self._handles.add(module, module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.add(module, module.register_forward_hook(after))

    def remove(self) -> None:
        self._handles.remove()

    def _before(self, hooked: nn.Module, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not hooked or is_in_backward() or (current := self._current()) is None:
                return
            call = current.calls[name]
            current.calls[name] += 1
            current.open_calls.setdefault(name, []).append(call)
            if _is_called_with_indices(module, args):
                current.from_indices.add(name)
            if self._is_full:
                for path, tensor in named_tensors((*args, kwargs) if kwargs else args):
                    if tensor.is_floating_point():
                        current.add(("input", name, path, call), tensor.detach(), is_full=True)

        return hook

    def _after(self, hooked: nn.Module, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is not hooked:
                return
            if is_in_backward():
                self._after_recomputation(name, output)
                return
            current = self._current()
            if current is None or not current.open_calls.get(name):
                return
            self._add_output(current, name, current.open_calls[name].pop(), output, (module, args))

        return hook

    def add_root_output(self, current: Pass, output: Any) -> None:
        """Record what the model itself returns."""
        if self._records_root:
            self._add_output(current, "", 0, output)

    def _add_output(
        self,
        current: Pass,
        name: str,
        call: int,
        output: Any,
        called: tuple[nn.Module, tuple[Any, ...]] | None = None,
    ) -> None:
        """Record an output and watch its gradient.

        Args:
            called: Which module returned it, and what it was given.
        """
        has_graph = False
        for path, tensor in named_tensors(output):
            if tensor.is_floating_point():
                columns = None
                if called is not None and current.decided is not None and tensor.dim():
                    columns = current.decided.columns(called[0], name, called[1], tensor)
                current.add(("output", name, path, call), tensor.detach(), columns=columns, is_full=self._is_full)
                has_graph |= self._watch_gradient(current, ("output_gradient", name, path, call), tensor)
        if not has_graph:
            current.unmatched.setdefault(name, []).append(call)

    def _after_recomputation(self, name: str, output: Any) -> None:
        """Watch the gradients of a recomputed output: of the latest call without any, as backward goes back in time."""
        for candidate in reversed(self._live()):
            if candidate.unmatched.get(name):
                call = candidate.unmatched[name].pop()
                for path, tensor in named_tensors(output):
                    if tensor.is_floating_point():
                        self._watch_gradient(candidate, ("output_gradient", name, path, call), tensor)
                return

    def _watch_gradient(self, owner: Pass, key: Key, tensor: torch.Tensor) -> bool:
        if not (tensor.requires_grad and torch.is_grad_enabled()) or tensor.is_leaf:
            return False  # a leaf is a parameter that is handed on (Megatron's biases): its hook would outlive the call

        def hook(gradient: torch.Tensor | None) -> None:
            owner.has_backward = True
            owner.has_second_derivatives |= torch.is_grad_enabled()
            if gradient is not None and owner in self._live():  # compiled code sends none where nothing comes back
                owner.add(key, gradient.detach(), is_full=self._is_full)

        tensor.register_hook(eager(hook))  # type: ignore[no-untyped-call]
        return True


def _is_called_with_indices(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Return whether a module without children is called with integers, as embeddings are."""
    first = args[0] if args else None
    is_integer = isinstance(first, torch.Tensor) and not first.is_floating_point() and not first.is_complex()
    return is_integer and next(module.children(), None) is None


def is_in_backward() -> bool:
    """Return whether autograd is running on this thread, so that a forward pass is a recomputation.

    Not a replay: where the optimizer steps in a hook of a backward pass, it is made inside of that.
    """
    return torch._C._current_graph_task_id() not in (_NO_BACKWARD, _backward_around.get())


@contextmanager
def repeating_calls() -> Iterator[None]:
    """Mark the calls of the model inside as replays, which the loop has not made."""
    token, around = _is_repeating.set(True), _backward_around.set(torch._C._current_graph_task_id())
    try:
        yield
    finally:
        _is_repeating.reset(token)
        _backward_around.reset(around)


def is_repeated_call() -> bool:
    """Return whether this call of a model is a replay by `record`."""
    return _is_repeating.get()


def views_of(output: Any) -> Any:
    """Return views of a model's outputs: their gradients are those that come from outside the model alone."""
    return map_tensors(lambda tensor: tensor.view_as(tensor) if tensor.requires_grad else tensor, output)


def loss_in(output: Any) -> torch.Tensor | None:
    """Return the loss among a model's outputs: a scalar output, or the one called `loss`; None where there is none."""
    loss = output if isinstance(output, torch.Tensor) else None
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif not isinstance(output, torch.Tensor):
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, tuple) and output:
            loss = output[0]
    is_loss = isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.is_floating_point()
    return local_values(loss.detach()) if is_loss and loss is not None else None


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "placements")


def local_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part without any communication; a `Partial` one is a term."""
    return tensor._local_tensor if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
