"""Traces made by hand: a small model's tensors at any topology, to which a test adds one mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xxhash

from tpcheck import Topology
from tpcheck.core.placement import Shard
from tpcheck.numerics.optimizer_view import ParameterGroup
from tpcheck.numerics.sketch import GlobalIndex, row_keys, sample_keys, sketch
from tpcheck.runs.trace.records import Leaf, PassRecord, RankTrace, Reading, StepRecord, TensorRecord

LENGTH, WIDTH, BATCH = 4, 32, 4
RATE = 0.1

# How each weight, and the output of each module, lies over the TP ranks; None is replicated.
WEIGHTS: Mapping[str, int | None] = {
    "embed.weight": 0,
    "layers.0.norm.weight": None,
    "layers.0.up.weight": 0,
    "layers.0.down.weight": 1,
    "head.weight": 0,
}
OUTPUTS: Mapping[str, int | None] = {
    "embed": None,
    "layers.0.norm": None,
    "layers.0.up": -1,
    "layers.0.down": None,
    "layers.0": None,
    "head": None,
    "": None,
}

Key = tuple[str, str]  # kind and name
Edit = Callable[["Place", torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Place:
    """Whose tensor an edit is asked for.

    Attributes:
        rank, tp_rank, dp_rank: Of the rank.
        step: Number of the step; -1 before the first.
        kind, name, part: Of the tensor.
        whole: The right whole tensor; of activations those of all samples.
    """

    rank: int
    tp_rank: int
    dp_rank: int
    step: int
    kind: str
    name: str
    part: str
    whole: torch.Tensor


@dataclass(frozen=True)
class Options:
    """A run made by hand.

    Attributes:
        tp, dp: Topology.
        steps: Number of steps.
        passes: Micro-batches of a step.
        replays: Whether deviations were measured.
        dtype: Of everything.
        edit: Returns what a rank has instead of the right local tensor; None where it has none.
        rounding: Random relative error of everything, in epsilons.
        layouts: Whether the layouts of parameters are known.
        same_batch: Both replicas are given the whole batch.
        reported_norm: By rank, what the engine tells.
        rates: Learning rate by step.
        optimizer: Class.
        moments, initial_moments: Whether there is optimizer state; before the first step, too.
        masters: Whether there are master weights.
        change: Returns what a rank has instead of a step; None where it has none.
        seed: Of the rounding.
        accumulated: Whether gradients before each further micro-batch were kept.
        generators: States of the generators before each call.
        draws: Whether each call draws random numbers, and leaves the generators in another state.
        rename: Gives the names.
        batch_seed: Of the samples.
        biases: Modules with a bias, which is replicated.
        trains_biases: Whether these have a gradient; no step moves them.
        noise_of_replays: Relative deviation; None for what the dtype has.
    """

    tp: int = 1
    dp: int = 1
    steps: int = 2
    passes: int = 1
    replays: int = 2
    dtype: torch.dtype = torch.float64
    edit: Edit | None = None
    rounding: float = 0.0
    layouts: bool = True
    same_batch: bool = False
    reported_norm: Callable[[int, Mapping[str, torch.Tensor]], float] | None = None
    rates: Sequence[float] = (RATE,) * 20
    optimizer: str = "SGD"
    change: Callable[[int, StepRecord], StepRecord | None] | None = None
    moments: bool = False
    initial_moments: bool = False
    masters: bool = False
    noise_of_replays: float | None = None
    seed: int = 0
    accumulated: bool = False
    generators: str = "same"
    draws: bool = False
    rename: Callable[[str], str] = field(default=lambda name: name)
    batch_seed: int = 0
    biases: Sequence[str] = ()
    trains_biases: bool = False


def run(**options: Any) -> tuple[RankTrace, ...]:
    """Return the traces of all ranks."""
    chosen = Options(**options)
    topology = Topology(tp=chosen.tp, dp=chosen.dp)
    return tuple(_rank(rank, topology, chosen) for rank in range(topology.world_size))


def wholes(step: int, dtype: torch.dtype = torch.float64) -> dict[Key, torch.Tensor]:
    """Return the right whole tensors of a step, but for weights and moments."""
    generator = torch.Generator().manual_seed(1000 + step)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {}
    for kind in ("output", "output_gradient"):
        for name in OUTPUTS if kind == "output" else reversed(OUTPUTS):
            tensors[kind, name] = random() if name == "" else random(BATCH, LENGTH, WIDTH)
    for name in WEIGHTS:
        tensors["gradient", name] = random(WIDTH) if "norm" in name else random(WIDTH, WIDTH)
    return tensors


def initial_weights(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {name: (WIDTH,) if "norm" in name else (WIDTH, WIDTH) for name in WEIGHTS}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def bias() -> torch.Tensor:
    """Return the bias of modules that have one."""
    return torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)


def micro_batch_gradients(step: int, passes: int, name: str) -> list[torch.Tensor]:
    """Return the whole gradient of each micro-batch; they add up to that of the step."""
    whole = wholes(step)["gradient", name]
    generator = torch.Generator().manual_seed(step * 100 + passes)
    terms = [torch.randn(whole.shape, generator=generator, dtype=torch.float64) for _ in range(passes - 1)]
    return [*terms, whole - sum(terms, torch.zeros_like(whole))]


def _rank(rank: int, topology: Topology, options: Options) -> RankTrace:
    position = topology.coordinate(rank)
    maker = _Maker(rank, position["tp"], position["dp"], topology, options)
    weights = initial_weights(options.dtype)
    moments = {name: weight.flip(0) for name, weight in weights.items()}
    at_start = {("weight", name): weight for name, weight in weights.items()}
    at_start |= {("weight", f"{module}.bias"): bias() for module in options.biases}
    if options.initial_moments:
        at_start |= {("state", name): moment for name, moment in moments.items()}
    if options.masters:
        at_start |= {("master", name): weight for name, weight in weights.items()}
    initial = maker.records(-1, at_start)
    steps = []
    for number in range(options.steps):
        tensors = wholes(number, options.dtype)
        gradients = {name: tensors["gradient", name] for name in WEIGHTS}
        moments = {name: 0.9 * moment + 0.1 * gradients[name] for name, moment in moments.items()}
        weights = {name: weight - options.rates[number] * gradients[name] for name, weight in weights.items()}
        tensors |= {("weight", name): weight for name, weight in weights.items()}
        if options.trains_biases:
            tensors |= {("gradient", f"{module}.bias"): bias() for module in options.biases}
        if options.moments:
            tensors |= {("state", name): moment for name, moment in moments.items()}
        if options.masters:
            tensors |= {("master", name): weight for name, weight in weights.items()}
        step = maker.step(number, tensors, gradients)
        if options.change is not None:
            changed = options.change(rank, step)
            if changed is None:
                continue
            step = changed
        steps.append(step)
    return RankTrace(
        rank=rank,
        topology=topology,
        tp_group=topology.peers(rank, "tp"),
        dp_group=topology.peers(rank, "dp"),
        dtype=str(options.dtype).removeprefix("torch."),
        versions={"torch": "2.13.0"},
        replays=options.replays,
        source="Module",
        initial=initial,
        steps=tuple(steps),
        num_steps=sum(step.has_update for step in steps),
    )


@dataclass
class _Maker:
    rank: int
    tp_rank: int
    dp_rank: int
    topology: Topology
    options: Options

    def step(
        self, number: int, tensors: Mapping[Key, torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> StepRecord:
        options = self.options
        samples = self._samples(number)
        keys = sample_keys(samples)
        passes = tuple(
            PassRecord(
                (Leaf("input_ids", "int64", tuple(some.shape), _digest(samples[some])),),
                tuple(f"{key & (1 << 64) - 1:016x}" for key in keys[some].tolist()),
                loss=1.0,
                has_backward=True,
                generators={"torch": options.generators},
                generators_after={"torch": f"{options.generators} {number}" if options.draws else options.generators},
            )
            for some in torch.arange(len(samples)).tensor_split(options.passes)
        )
        records = self.records(number, tensors)
        reported = options.reported_norm(self.rank, gradients) if options.reported_norm else None
        names = tuple(options.rename(name) for name in WEIGHTS)
        group = ParameterGroup(options.optimizer, {"lr": options.rates[number], "momentum": 0.0}, names)
        return StepRecord(number, True, passes, records, (group,), reported_norm=reported)

    def records(self, step: int, tensors: Mapping[Key, torch.Tensor]) -> tuple[TensorRecord, ...]:
        made = []
        for (kind, name), whole in tensors.items():
            if kind == "gradient" and self.options.accumulated:
                made += self._accumulated(step, name)
            record = self._record(step, kind, name, whole)
            if record is not None:
                made.append(record)
        return tuple(made)

    def _accumulated(self, step: int, name: str) -> list[TensorRecord]:
        terms = micro_batch_gradients(step, self.options.passes, name)
        records = []
        for number in range(1, self.options.passes):
            whole = sum(terms[1:number], terms[0])
            record = self._record(step, "accumulated", name, whole, part=str(number))
            if record is not None:
                records.append(record)
        return records

    def _samples(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(500 + step + 1000 * self.options.batch_seed)
        samples = torch.randint(0, 1 << 40, (BATCH, LENGTH), generator=generator)
        return samples if self.options.same_batch else samples.tensor_split(self.topology.dp)[self.dp_rank]

    def _record(self, step: int, kind: str, name: str, whole: torch.Tensor, part: str = "") -> TensorRecord | None:
        options = self.options
        part = {"state": "exp_avg"}.get(kind, "loss" if name == "" else part)
        values = whole
        if options.rounding and step >= 0:
            generator = torch.Generator().manual_seed(
                xxhash.xxh32_intdigest(f"{step} {kind} {name}".encode()) + options.seed
            )
            noise = torch.rand(whole.shape, generator=generator, dtype=torch.float64) * 2 - 1
            eps = torch.finfo(options.dtype).eps
            values = (whole.double() * (1 + options.rounding * eps * noise)).to(options.dtype)
        is_activation = kind in ("output", "output_gradient")
        if is_activation and name and not options.same_batch:
            values = values.tensor_split(self.topology.dp)[self.dp_rank]
        if kind == "output_gradient" and name:
            values = values * (self.topology.dp if not options.same_batch else 1)
        dim = OUTPUTS[name] if is_activation else WEIGHTS.get(name)
        local = values if dim is None else values.chunk(self.topology.tp, dim)[self.tp_rank]
        if options.edit is not None:
            place = Place(self.rank, self.tp_rank, self.dp_rank, step, kind, name, part, whole)
            edited = options.edit(place, local)
            if edited is None:
                return None
            local = edited
        readings = self._of_activation(step, name, local) if is_activation else self._of_parameter(dim, whole, local)
        deviation = options.noise_of_replays or 1e-15
        size = float(torch.linalg.vector_norm(whole.double()))
        measured = deviation * size * (self.topology.dp if kind == "output_gradient" else 1)
        if options.replays and step >= 0:
            readings = [replace(reading, deviation=measured) for reading in readings]
        dtype = str(options.dtype).removeprefix("torch.")
        return TensorRecord(
            kind, options.rename(name), part, 0, dtype, tuple(local.shape), _digest(local), tuple(readings)
        )  # type: ignore[arg-type]

    def _of_activation(self, step: int, name: str, local: torch.Tensor) -> list[Reading]:
        if name == "":
            return [Reading("whole", (), "all", sketch(local))]
        rows = row_keys(sample_keys(self._samples(step)), LENGTH)
        width = local.shape[-1]
        tp, tp_rank = self.topology.tp, self.tp_rank
        whole = sketch(local, GlobalIndex.whole((width,)), rows=rows)
        readings = [Reading("whole", (-1, -1, width), "all", whole)]
        if tp > 1:
            index = GlobalIndex.shard((width * tp,), Shard(-1), tp, tp_rank)
            sharded = sketch(local, index, rows=rows)
            readings.append(Reading("dim -1", (-1, -1, width * tp), f"dim -1 {tp_rank}/{tp}", sharded))
        return readings

    def _of_parameter(self, dim: int | None, whole: torch.Tensor, local: torch.Tensor) -> list[Reading]:
        tp, tp_rank = self.topology.tp, self.tp_rank
        shape = tuple(whole.shape)
        if self.options.layouts or tp == 1:
            index = GlobalIndex.whole(shape) if dim is None else GlobalIndex.shard(shape, Shard(dim), tp, tp_rank)
            return [Reading("layout", shape, index.piece(), sketch(local, index))]
        if dim is None:
            return [Reading("whole", shape, "all", sketch(local))]
        readings = []
        for each in range(local.dim()):
            cut = list(local.shape)
            cut[each] *= tp
            index = GlobalIndex.shard(tuple(cut), Shard(each), tp, tp_rank)
            readings.append(Reading(f"dim {each}", tuple(cut), f"dim {each} {tp_rank}/{tp}", sketch(local, index)))
        return readings


def _digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(
        tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor.item()).encode()
    )
