"""Measures what rounding may do to each tensor of a step: passes and update are repeated under random rounding."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import copysign, inf, isfinite, isnan, sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpcheck.core.cuda import uses_cuda
from tpcheck.numerics.optimizer_view import OptimizerView, Part
from tpcheck.numerics.optimizers.names import unwrapped_name
from tpcheck.numerics.perturb import KeyedPerturbation, perturbed_leaves
from tpcheck.numerics.sketch import Sketch, distance, fetch_sketches
from tpcheck.numerics.tensors import named_tensors
from tpcheck.numerics.tolerance import MAGNIFICATION, SAFETY_FACTOR
from tpcheck.runs.recording.attributes import Attributes
from tpcheck.runs.recording.passes import (
    Key,
    ModuleHooks,
    Pass,
    PendingTensor,
    finished,
    joined_digests,
    local_values,
    merged,
)
from tpcheck.runs.recording.update_rounding import lies_in, moves_of_update, noise
from tpcheck.runs.trace.wholes import epsilon, total

# Ranks reach a step within this time, or replays, in which they communicate, are given up.
SECONDS_TO_WAIT = 30.0
# Of a factor of all gradients, such as a clip coefficient: engines compute it in float32, whatever the model's dtype.
FACTOR_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Repetition:
    """What one replay of the passes of a step has computed.

    Attributes:
        sketches: By key, one for each place.
        digests: Of outputs and their gradients; empty for a perturbed replay.
        magnification: By how much its perturbation is larger than rounding.
    """

    sketches: Mapping[Key, Sequence[Sketch]]
    digests: Mapping[Key, str]
    magnification: float = 1.0

    def moved(self, key: Key, place: int, base: Sketch) -> float:
        """Return how far rounding moves a tensor, which is what the replay has moved it by over its magnification."""
        return distance(self.sketches[key][place], base) / self.magnification


@dataclass(frozen=True, slots=True)
class OtherBits:
    """A tensor of the recorded pass that a replay under the same arguments, weights and generators has not repeated.

    Attributes:
        key: Its key.
        gap: Frobenius distance of the two.
        norm: Of the recorded one.
        rounding: Norm of what rounding each of its elements once does.
    """

    key: Key
    gap: float
    norm: float
    rounding: float

    @property
    def label(self) -> str:
        kind, name, part, call = self.key
        what = f"{kind.replace('_', ' ')} of {name or 'the model'}" + (f" {part}" if part not in ("", "0") else "")
        return what + (f", call {call}" if call else "")


@dataclass(frozen=True, slots=True)
class BeforeCall:
    """What a call of the model depends on beside its arguments and weights.

    Attributes:
        attributes: Of its modules, which may count calls, or be in evaluation mode when the call is repeated.
        versions: Of its weights: they count changes in place.
    """

    random_state: torch.Tensor
    cuda_state: torch.Tensor | None
    autocast: tuple[tuple[str, torch.dtype], ...]
    attributes: Attributes
    versions: Sequence[int]


@dataclass(frozen=True, slots=True)
class OtherPasses:
    """Steps whose replays were not the recorded passes.

    Attributes:
        reason: Why, in the first of them.
        steps: Their numbers.
    """

    reason: str = ""
    steps: frozenset[int] = frozenset()


class Replays:
    """Repeats the passes of a step before the optimizer's step, and the step itself on copies.

    Gradients, buffers, generators, weights and what modules keep in attributes are as before afterwards. Ranks of a TP
    group, and those that hold slices of the same samples, repeat together: one that does not come is waited for once.

    Attributes:
        number: How many perturbed replays.
        deviations: For the tensors of the last step, how far they moved: one number for each place. Of buffers, too.
        drift: For weights, masters and states, what rounding adds up to since the recording began.
        inner_dtype: The lowest dtype that the passes compute in; empty where that is unknown.
        not_measured: Why something was not measured, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        view: OptimizerView,
        number: int,
        names: Mapping[nn.Module, str],
        together: Sequence[int],
        run: str,
        num_slices: int = 1,
    ) -> None:
        self.number = number
        self.deviations: dict[Key, Sequence[float]] | None = None
        self.drift: dict[Key, Sequence[float]] = {}
        self.inner_dtype = ""
        self.not_measured: dict[str, str] = {}
        self._model = model
        self._view = view
        self._names = names
        self._together = tuple(together)
        self._num_slices = num_slices
        self._run = run
        self._rounds = 0
        self._twins: dict[str, nn.Parameter] | None = None
        self._last_step = -1
        self._factor_rounding = 0.0
        self._last_moves: dict[Key, float] = {}
        self._other_passes = OtherPasses()
        # FSDP2 gathers parameters in its hooks, and reduces gradients as they are accumulated. After a forward pass the
        # root has its gathered ones in place of the sharded ones, whose gradients are the loop's.
        self._accumulates = any(hasattr(module, "_get_fsdp_state") for module in model.modules())
        self._sharded = dict(model.named_parameters()) if self._accumulates else {}
        if number and (reason := view.supports_replays()):
            self.not_measured["replays"] = f"{reason}: record the run that this one is compared with with replays"
            self.number = 0
        if self._accumulates:
            self._together = tuple(range(dist.get_world_size()))

    def before_call(self) -> BeforeCall | None:
        """Return what a replay has to put back before it calls the model; None where there are no replays."""
        if not self.number:
            return None
        devices = ["cpu", *(["cuda"] if uses_cuda() else [])]
        autocast = tuple((each, torch.get_autocast_dtype(each)) for each in devices if torch.is_autocast_enabled(each))
        return BeforeCall(
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if uses_cuda() else None,
            autocast,
            Attributes.of(self._model),
            self._versions(),
        )

    def _versions(self) -> list[int]:
        return [local_values(parameter)._version for parameter in self._model.parameters()]

    def watch_seeds(self, current: Pass, output: Any) -> None:
        """Keep the gradients that reach the model's outputs from outside, and what its modules keep of the call."""
        kept = {} if current.before is None else current.before.attributes.replace_by_views()
        for path, tensor in (*named_tensors(output), *kept.items()):
            if tensor.requires_grad:
                tensor.register_hook(self._keep_seed(current, path))

    def forget(self) -> None:
        """Forget the step that was measured last."""
        self.deviations = None

    def repeat_passes(self, step: int, passes: Sequence[Pass], gradients: Sequence[PendingTensor]) -> None:
        """Measure how far the passes of the step that the optimizer is about to take move.

        Args:
            step: Its number.
            passes: Its micro-batches, with the gradients of their outputs.
            gradients: What the optimizer gets.
        """
        if "replays" in self.not_measured or not passes:
            return
        if not self._all_ranks_are_here(step):
            self.not_measured["replays"] = (
                f"one of the ranks {list(self._together)} did not reach the optimizer's step {step} within "
                f"{SECONDS_TO_WAIT:.0f} s: nothing was measured from there on"
            )
            return
        self._extrapolate_drift(step)
        try:
            unperturbed, *perturbed = self._repeat_all(step, passes)
        except RuntimeError as error:
            self.not_measured["replays"] = f"the passes cannot be repeated: {str(error).partition(chr(10))[0]}"
            return
        deviations = self._deviations(unperturbed.sketches, perturbed, gradients)
        different = self._other_bits(passes, unperturbed)
        if not different:
            self.deviations = deviations
        elif self._is_rounding(different, deviations):
            self._note_nondeterminism(step, different[0])
            gaps = {each.key: each.gap for each in different}
            self.deviations = {
                key: [max(moved, gaps.get(key, 0.0)) for moved in of_places] for key, of_places in deviations.items()
            }
        else:
            self._note_other_passes(step, different[0], passes)

    # ---- whether a replay is the recorded pass

    def _other_bits(self, passes: Sequence[Pass], unperturbed: Repetition) -> list[OtherBits]:
        """Return what the replay without perturbation computed otherwise than the loop, in the order of events."""
        recorded = joined_digests(passes)
        keys = [key for key, bits in recorded.items() if unperturbed.digests.get(key, bits) != bits]
        keys.sort(key=lambda key: key[0] != "output")  # all forward passes come before what follows from them
        different = []
        for key in keys:
            terms = [each.tensors[key] for each in passes if key in each.tensors]
            if not (all(term.sketches for term in terms) and unperturbed.sketches[key]):  # of no one shape
                different.append(OtherBits(key, inf, 1.0, 0.0))
                continue
            first = total(fetch_sketches([term.sketches[0] for term in terms]))
            if key[0] == "output" and terms[0].places[0].rows is None:
                first = first.scaled(1 / len(passes))
            gap, norm = distance(first, unperturbed.sketches[key][0]), sqrt(max(first.sum_squares, 0.0))
            eps = max(epsilon(terms[0].dtype), epsilon(self.inner_dtype))
            different.append(OtherBits(key, inf if isnan(gap) else gap, norm, eps * norm))
        return different

    @staticmethod
    def _is_rounding(different: Sequence[OtherBits], deviations: Mapping[Key, Sequence[float]]) -> bool:
        """Return whether a replay differs by rounding alone, as where sums are taken in another order each time.

        What was given to the first tensor that differs was equal to the bit. What comes after it may be off by what
        rounding does there. A replay whose perturbed repetitions move for another reason would not pass at the first.
        """
        first, *others = different
        return first.gap <= SAFETY_FACTOR * first.rounding and all(
            each.gap <= SAFETY_FACTOR * max(each.rounding, *deviations[each.key][:1]) for each in others
        )

    def _note_nondeterminism(self, step: int, first: OtherBits) -> None:
        self.not_measured.setdefault(
            "bits that repeat",
            f"{first.label} is not deterministic: a replay of step {step} without perturbation has rounded otherwise "
            f"(relative difference {_relative(first):.1e}); that is part of what is allowed",
        )

    def _note_other_passes(self, step: int, first: OtherBits, passes: Sequence[Pass]) -> None:
        reason = self._other_passes.reason or (
            f"{first.label}: a replay with the same arguments, weights and states of torch's generators gives another "
            f"(relative difference {_relative(first):.1e}), so {self._why_others(first, passes)}"
        )
        self._other_passes = OtherPasses(reason, self._other_passes.steps | {step})
        number = len(self._other_passes.steps)
        which = (
            f"step {step}" if number == 1 else f"{number} steps, the first of which is {min(self._other_passes.steps)}"
        )
        self.not_measured["replays that are not the recorded pass"] = (
            f"{reason}, and nothing measured what rounding may do in {which}"
        )

    def _why_others(self, first: OtherBits, passes: Sequence[Pass]) -> str:
        if any(each.before is not None and each.before.versions != self._versions() for each in passes):
            return "it depends on the weights, which the loop has changed between this call and the optimizer's step"
        if any(each.has_second_derivatives for each in passes):
            return "it is the gradient of a gradient (create_graph), which replays do not take"
        changed = "a buffer, a counter, random numbers that are not torch's, a tensor that a closure holds"
        if first.key[0] == "output_gradient":
            return (
                "gradients come back through something that neither the model returns nor a module keeps as a "
                f"scalar in an attribute, or it depends on something that has changed since ({changed})"
            )
        return f"it depends on something that has changed since ({changed})"

    @staticmethod
    def _keep_seed(current: Pass, path: str) -> Any:
        def keep(gradient: torch.Tensor | None) -> None:
            if gradient is None:  # of an output that the loss does not use, in a DistributedDataParallel
                return
            known = current.seeds.get(path)
            current.seeds[path] = gradient.detach().clone() if known is None else known + gradient.detach()

        return keep

    # ---- passes

    def _repeat_all(self, step: int, passes: Sequence[Pass]) -> list[Repetition]:
        outputs: list[dict[str, torch.Tensor]] = [{} for _ in passes]
        try:
            return [self._repeat(each, passes, outputs) for each in (None, *self._perturbations(step, passes))]
        except RuntimeError:
            if self._twins is not None:
                raise
        # Reentrant checkpointing refuses torch.autograd.grad: gradients are then gathered by parameters that share
        # their memory with the model's, and have none of the hooks.
        self._twins = {
            name: nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            for name, parameter in self._model.named_parameters()
        }
        return self._repeat_all(step, passes)

    def _perturbations(self, step: int, passes: Sequence[Pass]) -> list[KeyedPerturbation]:
        """Return those of a step's replays; for a model in float32 the last two are magnified, in both directions."""
        seeds = [step << 20 | number for number in range(1, self.number + 1)]
        is_float32 = all(parameter.dtype is torch.float32 for parameter in self._model.parameters())
        if not seeds or not is_float32 or any(each.before.autocast for each in passes if each.before is not None):
            return [KeyedPerturbation(seed) for seed in seeds]
        opposites = [KeyedPerturbation(seeds[-1], sign * MAGNIFICATION) for sign in (1, -1)]
        return [*(KeyedPerturbation(seed) for seed in seeds[: max(1, len(seeds) - 1)]), *opposites]

    @contextmanager
    def _twins_in_place(self) -> Iterator[None]:
        """Let the model compute with the parameters that share the memory of its own, if there are any."""
        own = {id(parameter): name for name, parameter in self._model.named_parameters()}
        places = [
            (module, attribute, parameter)
            for module in self._model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        ]
        try:
            if self._twins is not None:
                for module, attribute, parameter in places:
                    module._parameters[attribute] = self._twins[own[id(parameter)]]
            yield
        finally:
            for module, attribute, parameter in places:
                module._parameters[attribute] = parameter

    def _repeat(
        self, perturbation: KeyedPerturbation | None, passes: Sequence[Pass], outputs: list[dict[str, torch.Tensor]]
    ) -> Repetition:
        """Repeat all passes once and return the sketches of all tensors.

        The first replay is not perturbed; it leaves the model's outputs in `outputs`.
        """
        live: list[Pass] = []
        current: list[Pass | None] = [None]
        sums: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # off where the optimizer steps in a backward pass
            stack.enter_context(self._state_put_back())
            stack.enter_context(self._twins_in_place())
            if perturbation is not None:
                stack.enter_context(self._perturbed_weights(perturbation))
                stack.enter_context(perturbed_leaves(self._model, perturbation))  # before the hooks that record
            elif not self.inner_dtype:
                stack.enter_context(self._dtypes_seen())
            hooks = ModuleHooks(self._names, lambda: current[0], lambda: live, is_full=False)
            stack.callback(hooks.remove)
            for recorded, unperturbed in zip(passes, outputs, strict=True):
                again = Pass.like(recorded)
                live.append(again)
                current[0] = again
                output = self._call(recorded)
                hooks.add_root_output(again, output)
                current[0] = None
                given = {**dict(named_tensors(output)), **recorded.before.attributes.new_losses()}
                results = {path: tensor for path, tensor in given.items() if path in recorded.seeds}
                seeds = recorded.seeds
                if perturbation is not None:
                    seeds = {
                        path: self._moved_seed(path, results, unperturbed, recorded, perturbation) for path in results
                    }
                else:
                    unperturbed.update({path: local_values(tensor.detach()) for path, tensor in results.items()})
                self._backward(results, seeds, sums)
            gradients = [PendingTensor.whole(("gradient", name, "", 0), value) for name, value in sums.items()]
            buffers = [
                PendingTensor.whole(("buffer", unwrapped_name(name), "", 0), local_values(buffer))
                for name, buffer in self._model.named_buffers()
            ]
        digests = joined_digests(live) if perturbation is None else {}
        records = finished([*merged(live), *gradients, *buffers], num_passes=len(passes))
        sketches = {record.key: [each.sketch for each in record.readings] for record in records}
        return Repetition(sketches, digests, 1.0 if perturbation is None else abs(perturbation.magnification))

    def _call(self, recorded: Pass) -> Any:
        before: BeforeCall = recorded.before
        torch.set_rng_state(before.random_state)
        if before.cuda_state is not None:
            torch.cuda.set_rng_state(before.cuda_state)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for device, dtype in before.autocast:
                stack.enter_context(torch.autocast(device, dtype))
            before.attributes.put_back()
            return self._model(*recorded.args, **recorded.kwargs)

    @staticmethod
    def _moved_seed(
        path: str,
        results: Mapping[str, torch.Tensor],
        unperturbed: Mapping[str, torch.Tensor],
        recorded: Pass,
        perturbation: KeyedPerturbation,
    ) -> torch.Tensor:
        """Return the gradient that the loop would send back for this output, were its rounding another.

        What the loop computes of the output is unknown: its gradient moves as far as the output does, relatively. The
        gradient of a loss is a constant.
        """
        seed = recorded.seeds[path]
        expected = unperturbed[path].double()
        if expected.dim() == 0:
            return seed
        moved = float(torch.linalg.vector_norm(local_values(results[path].detach()).double() - expected))
        norm = float(torch.linalg.vector_norm(expected))
        if not moved or not norm:
            return seed
        seed = seed.clone()
        local = local_values(seed)
        local += noise(
            local,
            copysign(moved / norm * float(torch.linalg.vector_norm(local.double())), perturbation.magnification),
            perturbation.generator(f"seed {path}", local.device),
            like_nonzero=True,
        )
        return seed

    def _backward(
        self, results: Mapping[str, torch.Tensor], seeds: Mapping[str, torch.Tensor], sums: dict[str, torch.Tensor]
    ) -> None:
        """Send gradients of the outputs back, without the hooks that reduce or take gradients of parameters."""
        ordered = [seeds[path] for path in results]
        gradients: Sequence[torch.Tensor | None]
        named = (self._twins or self._sharded or dict(self._model.named_parameters())).items()
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        if self._accumulates or self._twins is not None:
            with _gradients_set_aside([*trained.values()]):
                torch.autograd.backward([*results.values()], ordered)
                gradients = [parameter.grad for parameter in trained.values()]
        else:
            gradients = torch.autograd.grad([*results.values()], [*trained.values()], ordered, allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                local = local_values(gradient).detach()
                name = unwrapped_name(name)
                sums[name] = sums[name] + local if name in sums else local

    def _deviations(
        self,
        unperturbed: Mapping[Key, Sequence[Sketch]],
        perturbed: Sequence[Repetition],
        gradients: Sequence[PendingTensor],
    ) -> dict[Key, Sequence[float]]:
        scale = self._scale(unperturbed, gradients)
        # Twice: the mean over data parallelism makes gradients smaller, too, and their rounding less so. The sum over
        # slices of a sequence makes them, and their rounding, larger.
        shrinking = min(float(self._num_slices), 2 * scale)
        self._factor_rounding = FACTOR_ROUNDING if abs(scale - 1) > FACTOR_ROUNDING else 0.0
        deviations: dict[Key, Sequence[float]] = {}
        for key, base in unperturbed.items():
            if perturbed and not any(key in each.sketches for each in perturbed):
                # Of an output that its module uses itself, a replay perturbs a copy, through which no gradient comes.
                largest = _largest_relative_move(key[0], unperturbed, perturbed)
                deviations[key] = [largest * sqrt(sketch.sum_squares) for sketch in base]
                continue
            moved = [
                max(
                    [
                        self._flips(sketch),
                        *(each.moved(key, place, sketch) for each in perturbed if key in each.sketches),
                    ]
                )
                for place, sketch in enumerate(base)
            ]
            deviations[key] = moved
            if key[0] == "gradient":
                norms = [scale * sqrt(sketch.sum_squares) for sketch in base]
                deviations[key] = [
                    distance * shrinking + self._factor_rounding * norm
                    for distance, norm in zip(moved, norms, strict=True)
                ]
        return deviations

    def _flips(self, sketch: Sketch) -> float:
        """Return what one element adds that rounds the other way in a lower dtype inside (norms that cast to float32).

        Rounding in float64 makes that happen once in a billion casts: a replay does not show it.
        """
        if not self.inner_dtype or not sketch.numel or not isfinite(sketch.sum_squares):
            return 0.0
        return torch.finfo(getattr(torch, self.inner_dtype)).eps * sqrt(sketch.sum_squares / sketch.numel)

    def _scale(self, unperturbed: Mapping[Key, Sequence[Sketch]], gradients: Sequence[PendingTensor]) -> float:
        """Return by what factor clipping, unscaling and means scale gradients, from the norms before and after."""
        given = [tensor for tensor in gradients if tensor.sketches and tensor.key in unperturbed]
        sketches = fetch_sketches([tensor.sketches[0] for tensor in given])
        before = sum(unperturbed[tensor.key][0].sum_squares for tensor in given)
        after = sum(sketch.sum_squares for sketch in sketches)
        return sqrt(after / before) if before else 1.0

    @contextmanager
    def _dtypes_seen(self) -> Iterator[None]:
        """Note the lowest floating-point dtype that is computed in, for a model in float64."""
        if any(parameter.dtype is not torch.float64 for parameter in self._model.parameters()):
            yield
            return
        with _LowestDtype() as seen:
            yield
        self.inner_dtype = seen.name

    # ---- weights and optimizer state

    @contextmanager
    def _perturbed_weights(self, perturbation: KeyedPerturbation) -> Iterator[None]:
        """Move each weight at random as far as rounding has moved it since the recording began."""
        saved = []
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                drift = self.drift.get(("weight", unwrapped_name(name), "", 0), (0.0,))[0]
                local = local_values(parameter).data
                if drift and local.numel():
                    saved.append((local, local.clone()))
                    generator = perturbation.generator(name, local.device)
                    local += noise(local, perturbation.magnification * drift, generator)
        try:
            yield
        finally:
            with torch.no_grad():
                for local, value in saved:
                    local.copy_(value)

    def repeat_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Measure the optimizer's step on copies of each of its parameters, with rounding in what it is given."""
        if self.deviations is None:
            return
        self._last_step = step
        parts = [*self._view.gradients(optimizer)]
        masters = {part.name for part in self._view.states() if part.kind == "master"}
        weights = {part.name: part for part in self._view.weights()}
        low_precision = {name for name, weight in weights.items() if weight.values.dtype.itemsize < 4}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                inside = [part for part in parts if lies_in(part.values, parameter.grad)]
                if not inside:
                    continue
                try:
                    moves = moves_of_update(
                        optimizer,
                        group,
                        parameter,
                        inside,
                        self.deviations,
                        self.drift,
                        self._factor_rounding,
                        low_precision,
                        step,
                    )
                except Exception as error:  # optimizers of third parties may need more than a parameter and its state
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    self.not_measured["updates"] = f"{type(optimizer).__name__} cannot repeat its step: {reason}"
                    return
                self._add_moves(moves, weights, masters)

    def _add_moves(self, moves: Mapping[Key, float], weights: Mapping[str, Part], masters: Collection[str]) -> None:
        for key, move in moves.items():
            kind, name, *_ = key
            if kind == "state":
                self.drift[key] = (move,)
            elif kind == "weight" or name in masters:
                self.drift[key] = (self.drift.get(key, (0.0,))[0] + move,)
                self._last_moves[key] = move
            weight = weights.get(name) if kind == "weight" else None
            if weight is not None and weight.values.dtype.itemsize < 4:
                self._round_weight(weight)

    def _round_weight(self, weight: Part) -> None:
        """Add that a weight of 16 bits, rounded from a master, goes to the next number for a share of its elements."""
        key: Key = ("weight", weight.name, "", 0)
        ulp = torch.finfo(weight.values.dtype).eps * float(torch.linalg.vector_norm(weight.values.float()))
        drift = self.drift[key][0]
        if ulp:
            self.drift[key] = (max(drift, ulp * sqrt(min(1.0, drift / ulp))),)

    def _extrapolate_drift(self, step: int) -> None:
        """Add what the steps in between, that were not recorded, do at the rate of the last recorded one."""
        missing = step - self._last_step - 1
        for key, move in self._last_moves.items():
            self.drift[key] = (self.drift[key][0] + missing * move,)

    # ---- the state of the loop

    @contextmanager
    def _state_put_back(self) -> Iterator[None]:
        random_state = torch.get_rng_state()
        cuda_states = torch.cuda.get_rng_state_all() if uses_cuda() else []
        buffers = [(module, name, each, each.detach().clone()) for module in self._model.modules()
                   for name, each in module._buffers.items() if each is not None]  # fmt: skip
        attributes = Attributes.of(self._model)
        try:
            yield
        finally:
            attributes.put_back()
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
            torch.set_rng_state(random_state)
            if cuda_states:
                torch.cuda.set_rng_state_all(cuda_states)

    def _all_ranks_are_here(self, step: int) -> bool:
        """Return whether all ranks that repeat together have come to this step; the same answer on all that have."""
        if len(self._together) == 1:
            return True
        store, key = self._next_round()
        if store.add(f"{key}/here", 1) == len(self._together):
            return bool(store.compare_set(f"{key}/decision", "", "go") == b"go")
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while time.monotonic() < deadline:
            if store.check([f"{key}/decision"]):
                return bool(store.get(f"{key}/decision") == b"go")
            time.sleep(0.001)
        return bool(store.compare_set(f"{key}/decision", "", "stop") == b"go")

    def decline(self) -> None:
        """Let the ranks that want to repeat passes at the end of the recording do without: this rank has none."""
        if self.number and len(self._together) > 1 and "replays" not in self.not_measured:
            store, key = self._next_round()
            store.compare_set(f"{key}/decision", "", "stop")

    def _next_round(self) -> tuple[Any, str]:
        """Return the store, and the prefix of this replay's keys."""
        self._rounds += 1
        store = dist.distributed_c10d._get_default_store()
        return store, f"tpcheck/replays/{self._run}/{self._together[0]}/{self._rounds}"


def _relative(other: OtherBits) -> float:
    return other.gap / other.norm if other.norm else other.gap


def _largest_relative_move(
    kind: str, unperturbed: Mapping[Key, Sequence[Sketch]], perturbed: Sequence[Repetition]
) -> float:
    """Return how far tensors of a kind moved at most, in units of their norms."""
    moves = [
        each.moved(key, 0, base[0]) / sqrt(base[0].sum_squares)
        for key, base in unperturbed.items()
        for each in perturbed
        if key[0] == kind and each.sketches.get(key) and base and base[0].sum_squares
    ]
    return max((move for move in moves if isfinite(move)), default=0.0)


@contextmanager
def _gradients_set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients accumulate from nothing, and put those back that were there."""
    saved = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, saved, strict=True):
            parameter.grad = gradient


class _LowestDtype(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator and keeps the lowest floating-point dtype that one returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = torch.float64

    @property
    def name(self) -> str:
        return "" if self._dtype is torch.float64 else str(self._dtype).removeprefix("torch.")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.Tensor) and kind not in (torch.Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            is_real = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if is_real and torch.finfo(tensor.dtype).eps > torch.finfo(self._dtype).eps:
                self._dtype = tensor.dtype
        return result
