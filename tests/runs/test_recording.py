"""A loop is recorded step by step, as its optimizer takes them, and computes the same numbers as without."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import tpcheck
from tpcheck import Rank, RankFailure, UsageError, spawn
from tpcheck.core.digests import start_digests
from tpcheck.numerics.sketch import GlobalIndex, distance, sketch, start_sketch
from tpcheck.runs.recording import passes
from tpcheck.runs.recording.activations import Place
from tpcheck.runs.trace.files import read_trace
from tpcheck.runs.trace.records import RankTrace, StepRecord, TensorRecord


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.norm(self.linear(hidden)).tanh()


class Model(nn.Module):
    """Embedding, two blocks, head; `checkpointing` as `use_reentrant`."""

    def __init__(self, *, checkpointing: bool | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 20)
        self.unused = nn.Linear(2, 2)
        self.checkpointing = checkpointing

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            if self.checkpointing is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.checkpointing)
        return self.head(hidden)


def model(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options).double()


def tokens(seed: int, samples: int = 4) -> torch.Tensor:
    return torch.randint(0, 20, (samples, 6), generator=torch.Generator().manual_seed(seed))


def train(trained: nn.Module, *, steps: int = 2, accumulate: int = 1, optimizer: Any = None) -> None:
    optimizer = optimizer or torch.optim.AdamW(trained.parameters(), lr=0.01)
    for step in range(steps):
        for micro_batch in range(accumulate):
            batch = tokens(step * 10 + micro_batch)
            loss: torch.Tensor = cross_entropy(trained(batch).flatten(0, 1), batch.flatten()) / accumulate
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def train_in_closures(trained: nn.Module, *, optimizer: Any = None) -> None:
    """Train as `train` does, with the passes inside the optimizer's step."""
    optimizer = optimizer or torch.optim.AdamW(trained.parameters(), lr=0.01)
    for step in range(2):

        def passes_of_step(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            batch = tokens(step * 10)
            loss: torch.Tensor = cross_entropy(trained(batch).flatten(0, 1), batch.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(passes_of_step)


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., RankTrace]:
    def record(trained: nn.Module, *, loop: Callable[[nn.Module], Any] = train, **options: Any) -> RankTrace:
        with tpcheck.record(trained, tmp_path / "run.trace", **options):
            loop(trained)
        [trace] = read_trace(tmp_path / "run.trace")
        return trace

    return record


def tensors(step: StepRecord, kind: str) -> dict[tuple[str, str], TensorRecord]:
    return {(tensor.name, tensor.part): tensor for tensor in step.tensors if tensor.kind == kind}


def of(record: TensorRecord) -> Any:
    return record.readings[0].sketch


def deviation(record: TensorRecord) -> float:
    value = record.readings[0].deviation
    assert value is not None
    return value


# ---- passes inside the optimizer's step


def test_passes_in_a_closure_are_recorded_as_those_before_the_step(recorded: Any) -> None:
    before = tuple(recorded(model(), replays=1).steps)  # read before the next one is written to the same place
    inside = tuple(recorded(model(), loop=train_in_closures, replays=1).steps)
    assert len(inside) == len(before) == 2
    for step_before, step_inside in zip(before, inside, strict=True):
        assert [each.key for each in step_inside.tensors] == [each.key for each in step_before.tensors]
        assert [each.digest for each in step_inside.tensors] == [each.digest for each in step_before.tensors]
        assert all(deviation(each) > 0 for each in tensors(step_inside, "gradient").values() if of(each).sum_squares)


def test_of_a_closure_that_is_called_again_at_other_weights_the_first_call_is_recorded(recorded: Any) -> None:
    def search(trained: nn.Module) -> None:
        train_in_closures(trained, optimizer=torch.optim.LBFGS(trained.parameters(), max_iter=3))

    first, expected = recorded(model(), loop=search).steps[0], recorded(model()).steps[0]
    for kind in ("output", "gradient"):
        digests = [{each.key: each.digest for each in tensors(step, kind).values()} for step in (first, expected)]
        assert digests[0] == digests[1]


def test_calls_of_a_copy_of_the_model_are_not_those_of_the_model(recorded: Any) -> None:
    def with_average(trained: nn.Module) -> None:
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
        for step in range(2):
            train(trained, steps=1, optimizer=optimizer)
            average = copy.deepcopy(trained)
            cross_entropy(average(tokens(step)).flatten(0, 1), tokens(step).flatten()).backward()

    def alone(trained: nn.Module) -> None:
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
        for _ in range(2):
            train(trained, steps=1, optimizer=optimizer)

    digests = [
        [each.digest for step in recorded(model(), loop=loop).steps for each in step.tensors]
        for loop in (with_average, alone)
    ]
    assert digests[0] == digests[1]


# ---- the loop is left as it is


def test_a_loop_saves_and_copies_its_model(recorded: Any) -> None:
    def saved(trained: nn.Module) -> None:
        train(trained)
        file = io.BytesIO()
        torch.save(trained, file)
        assert b"tpcheck" not in file.getvalue()
        twin = pickle.loads(pickle.dumps(trained))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
        assert torch.equal(twin(tokens(0)), trained(tokens(0)))

    recorded(model(), loop=saved, replays=1)


@pytest.mark.parametrize("replays", [0, 2])
def test_what_modules_keep_in_attributes_is_the_loops(replays: int, recorded: Any) -> None:
    """A replay finds it as the call did, and leaves it; a loss that is kept there has its gradient in replays, too."""

    def loop(trained: nn.Module) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        keeping: Any = trained.get_submodule("blocks.0.norm.1")
        for step in range(3):
            logits = trained(tokens(step))
            (logits.square().mean() + keeping.last + sum(keeping.losses)).backward()
            keeping.losses.clear()
            trained.eval()
            optimizer.step()
            trained.train()
            optimizer.zero_grad()

    plain, watched = model(), model()
    for each in (plain, watched):
        each.blocks[0].norm = nn.Sequential(each.blocks[0].norm, KeepsLosses())
    loop(plain)
    trace = recorded(watched, loop=loop, replays=replays)
    assert trace.not_recorded == {}
    kept: Any = watched.blocks[0].norm
    assert (kept[1].calls, kept[1].log, kept[1].losses) == (3, [1, 2, 3], [])
    for expected, actual in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(actual, expected)
    if replays:
        assert all(0 < deviation(each) < 1e-12 for each in tensors(trace.steps[0], "gradient").values())


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"checkpointing": False}, {"dropout": 0.3}])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_recorded_loop_computes_the_same_bits(options: dict[str, Any], recorded: Any) -> None:
    plain = model(**options)
    torch.manual_seed(1)
    train(plain, accumulate=2)
    watched = model(**options)
    torch.manual_seed(1)
    recorded(watched, loop=lambda trained: train(trained, accumulate=2), replays=2)
    for expected, actual in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_no_hook_is_left_behind(recorded: Any) -> None:
    trained = model()
    recorded(trained)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.modules())


def test_a_loop_that_keeps_its_losses_keeps_no_step_in_memory(recorded: Any) -> None:
    """The hooks on what modules return lie in the graph that a loss holds."""
    kept, pending = [], []

    def loop(trained: nn.Module) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        for step in range(4):
            loss = cross_entropy(trained(tokens(step)).flatten(0, 1), tokens(step).flatten())
            kept.append(loss)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            pending.append(sum(type(each) is passes.PendingTensor for each in gc.get_objects()))

    recorded(model(), loop=loop, replays=1)
    assert pending[0] > 20
    assert pending[3] == pending[1]


def test_a_loop_that_raises_leaves_the_steps_before(tmp_path: Path) -> None:
    def loop() -> None:
        trained = model()
        with tpcheck.record(trained, tmp_path / "run.trace"):
            train(trained, steps=2)
            trained(tokens(0))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        loop()
    [trace] = read_trace(tmp_path / "run.trace")
    assert (len(trace.steps), trace.is_complete) == (2, False)


# ---- steps


def test_a_step_ends_with_the_optimizers_step(recorded: Any) -> None:
    trace = recorded(model(), loop=lambda trained: train(trained, steps=3, accumulate=2))
    assert [(step.number, step.has_update, len(step.passes)) for step in trace.steps] == [
        (0, True, 2), (1, True, 2), (2, True, 2)
    ]  # fmt: skip
    assert (trace.num_steps, trace.is_complete) == (3, True)


def test_two_optimizers_end_one_step(recorded: Any) -> None:
    def loop(trained: nn.Module) -> None:
        first, *others = trained.parameters()
        optimizers = torch.optim.SGD([first], lr=0.1), torch.optim.AdamW(others)
        for _ in range(2):
            trained(tokens(0)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    trace = recorded(model(), loop=loop)
    assert [step.number for step in trace.steps] == [0, 1]
    assert {group.optimizer for group in trace.steps[0].groups} == {"SGD", "AdamW"}
    assert len(tensors(trace.steps[0], "gradient")) == len(tensors(trace.steps[0], "weight")) - 2  # unused


def test_passes_without_an_optimizer_step_are_recorded_as_such(recorded: Any) -> None:
    [step] = recorded(model(), loop=lambda trained: trained(tokens(0)).sum().backward()).steps
    assert (step.has_update, len(step.passes)) == (False, 1)


def test_a_step_that_a_scaler_skips_is_no_step(recorded: Any) -> None:
    def loop(trained: nn.Module) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for step in range(2):
            (trained(tokens(step)).sum() * (float("inf") if step == 0 else 1)).backward()
            if step:
                optimizer.step()
            optimizer.zero_grad()

    first, second = recorded(model(), loop=loop).steps
    assert (first.is_skipped, first.has_update, len(first.passes)) == (True, False, 1)
    assert (second.is_skipped, second.has_update, len(second.passes)) == (False, True, 1)


def test_evaluations_are_not_recorded(recorded: Any) -> None:
    def loop(trained: nn.Module) -> None:
        train(trained, steps=1)
        with torch.no_grad():
            trained(tokens(5))
        trained(tokens(6))  # with a graph, but without a backward pass
        train(trained, steps=1)

    first, second = recorded(model(), loop=loop).steps
    assert (len(first.passes), len(second.passes)) == (1, 1)
    assert first.num_evaluations + second.num_evaluations == 2


def test_only_the_steps_that_are_asked_for_are_recorded(recorded: Any) -> None:
    for steps in (range(1, 6, 2), lambda number: number % 2 == 1):
        trace = recorded(model(), loop=lambda trained: train(trained, steps=5), steps=steps)
        assert ([step.number for step in trace.steps], trace.num_steps) == ([1, 3], 5)


def test_only_the_modules_that_are_asked_for_are_recorded(recorded: Any) -> None:
    step = recorded(model(), modules="blocks.1.*").steps[0]
    assert {name for name, _ in tensors(step, "output")} == {"blocks.1", "blocks.1.linear", "blocks.1.norm"}
    assert {name for name, _ in tensors(step, "gradient")} == {
        f"blocks.1.{each}" for each in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
    }


# ---- what is recorded


def test_gradients_are_those_that_the_optimizer_gets(recorded: Any) -> None:
    trained, gradients = model(), {}

    def loop(trained: nn.Module) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for seed in (0, 1):
            trained(tokens(seed)).square().mean().backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 0.01)
        gradients.update(
            {name: each.grad.clone() for name, each in trained.named_parameters() if each.grad is not None}
        )
        optimizer.step()

    [step] = recorded(trained, loop=loop).steps
    found = tensors(step, "gradient")
    assert {name for name, _ in found} == gradients.keys()
    for (name, _), record in found.items():
        assert distance(of(record), sketch(gradients[name])) < 1e-15
    assert step.gradient_norm == pytest.approx(0.01)


def test_weights_are_those_after_the_step(recorded: Any) -> None:
    trained = model()
    before = {name: each.detach().clone() for name, each in trained.named_parameters()}
    trace = recorded(trained)
    initial = {record.name: record for record in trace.initial if record.kind == "weight"}
    for name, weight in trained.named_parameters():
        assert distance(of(initial[name]), sketch(before[name])) == 0
        assert distance(of(tensors(trace.steps[-1], "weight")[name, ""]), sketch(weight)) == 0


def test_moments_and_rates_are_recorded(recorded: Any) -> None:
    step = recorded(model()).steps[-1]
    states = tensors(step, "state")
    assert {part for _, part in states} == {"step", "exp_avg", "exp_avg_sq"}
    assert of(states["head.weight", "step"]).sum_squares == 4
    assert step.groups[0].options["lr"] == 0.01


def test_states_that_are_changed_between_two_steps_are_recorded_as_the_optimizer_gets_them(recorded: Any) -> None:
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    given: dict[int, str] = {}

    def change(module: nn.Module, args: Any, output: Any) -> None:
        moments = optimizer.state.get(trained.head.weight)
        if moments:
            if len(given) == 1:
                moments["exp_avg"].zero_()
            given[len(given)] = xxhash.xxh3_128_hexdigest(start_digests([moments["exp_avg"]])()[0])

    trained.register_forward_hook(change)
    steps = recorded(trained, loop=lambda module: train(module, steps=4, optimizer=optimizer)).steps
    before = [
        {key: record.digest_before for key, record in tensors(step, "state").items() if record.digest_before}
        for step in steps
    ]
    assert before == [{}, {}, {("head.weight", "exp_avg"): given[1]}, {}]


def test_what_several_modules_return_is_sketched_once(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8).double()

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.inner(given)
            return output

    def loop(trained: nn.Module) -> None:
        trained(torch.ones(4, 8, dtype=torch.float64)).sum().backward()

    sketched: list[torch.Tensor] = []

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        sketched.append(tensor)
        return start_sketch(tensor, *args, **options)

    monkeypatch.setattr(passes, "start_sketch", counted)
    [step] = recorded(nn.Sequential(Wrapped()), loop=loop).steps
    assert len([record for record in step.tensors if record.kind == "output"]) == 3
    assert len([tensor for tensor in sketched if tensor.shape == (4, 8)]) == 2  # the output and its gradient


def test_tensors_that_begin_alike_have_sketches_of_their_own() -> None:
    known = passes.KnownSketches()
    tensor = torch.randn(80, 1000, generator=torch.Generator().manual_seed(0))
    changed = tensor.clone()
    changed[-1, -1] += 1
    place = Place("whole", (80, 1000), "all", GlobalIndex.whole((80, 1000)))
    taken = [
        passes.PendingTensor.of(("output", name, "", 0), each, (place,), known=known)
        for name, each in (("a", tensor), ("b", changed), ("c", tensor.clone()), ("d", changed.clone()))
    ]
    assert [each.digest() for each in taken[:2]] == [each.digest() for each in taken[2:]]
    assert taken[0].digest() != taken[1].digest()
    assert taken[2].sketches[0] is taken[0].sketches[0]
    assert taken[3].sketches[0] is taken[1].sketches[0]
    for each, expected in zip(taken, (tensor, changed), strict=False):
        assert torch.equal(each.sketches[0].packed, start_sketch(expected).packed)


def test_gradients_that_are_accumulated_so_far_are_recorded(recorded: Any) -> None:
    step = recorded(model(), loop=lambda trained: train(trained, steps=1, accumulate=3)).steps[0]
    assert {part for _, part in tensors(step, "accumulated")} == {"1", "2"}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_changes_nothing_that_is_recorded(checkpointing: bool, recorded: Any) -> None:
    expected, actual = (recorded(model(checkpointing=each)).steps[1] for each in (None, checkpointing))
    assert {record.key for record in actual.tensors} == {record.key for record in expected.tensors}
    for record, other in zip(actual.tensors, expected.tensors, strict=True):
        assert distance(of(record), of(other)) <= 1e-12


def test_a_module_that_is_called_twice_is_recorded_twice(recorded: Any) -> None:
    def loop(trained: nn.Module) -> None:
        twice = nn.Sequential(trained, nn.Flatten(0, 1), *[shared := nn.Linear(20, 20).double(), shared])
        with tpcheck.record(twice, path):
            twice(tokens(0)).sum().backward()

    path = recorded.__closure__[0].cell_contents / "twice.trace"
    loop(model())
    [step] = read_trace(path)[0].steps
    assert {record.call for record in step.tensors if record.name == "2" and record.kind == "output"} == {0, 1}


# ---- replays


def test_replays_measure_how_far_rounding_moves_each_tensor(recorded: Any) -> None:
    step = recorded(model(), replays=2).steps[-1]
    for kind in ("output", "output_gradient", "gradient", "weight"):
        for record in tensors(step, kind).values():
            if not record.name.startswith("unused"):
                assert 0 < deviation(record) < 1e-12 * of(record).norm + 1e-15, record.key
    assert all(record.readings[0].deviation is None for record in recorded(model()).steps[-1].tensors)


def test_each_optimizers_gradients_are_measured_alike(recorded: Any) -> None:
    """Gradients that the first optimizer gets are a part of all: no factor by which they were clipped."""

    def loop(trained: Any) -> None:
        last = [*trained.head.parameters()]
        others = [*trained.embedding.parameters(), *trained.blocks.parameters()]
        optimizers = [torch.optim.SGD(each, lr=0.1) for each in (others[-1:], [*others[:-1], *last])]
        trained(tokens(0)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    def loop_of_one(trained: nn.Module) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained(tokens(0)).square().mean().backward()
        optimizer.step()

    several, one = (
        {
            key: deviation(each)
            for key, each in tensors(recorded(model(), loop=each, replays=1).steps[0], "gradient").items()
        }
        for each in (loop, loop_of_one)
    )
    assert several == one
    assert min(one.values()) > 0


def test_optimizers_that_step_in_the_backward_pass_are_measured(recorded: Any) -> None:
    def loop(trained: nn.Module) -> None:
        optimizers = {each: torch.optim.SGD([each], lr=0.1) for each in trained.parameters()}
        for each, optimizer in optimizers.items():
            each.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())  # type: ignore[no-untyped-call]
        trained(tokens(0)).square().mean().backward()

    trace = recorded(model(), loop=loop, replays=1)
    assert trace.not_recorded == {}
    for kind in ("output", "output_gradient", "gradient"):
        assert all(deviation(each) > 0 for each in tensors(trace.steps[0], kind).values()), kind


def test_states_of_another_shape_than_the_parameter_are_measured(recorded: Any) -> None:
    trained = model()
    optimizer = torch.optim.Adafactor(trained.parameters(), lr=0.1)
    trace = recorded(trained, loop=lambda trained: train(trained, optimizer=optimizer), replays=1)
    states = tensors(trace.steps[1], "state")
    assert deviation(states["head.weight", "row_var"]) > 0
    assert deviation(states["head.weight", "col_var"]) > 0


def test_what_rounding_does_to_weights_adds_up_over_steps(recorded: Any) -> None:
    trace = recorded(model(), loop=lambda trained: train(trained, steps=6), replays=2)
    drift = [deviation(tensors(step, "weight")["head.weight", ""]) for step in trace.steps]
    assert drift == sorted(drift)
    assert drift[-1] > 3 * drift[0]


def test_a_cast_inside_may_round_one_element_the_other_way(recorded: Any) -> None:
    class Casts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float().double()

    def loop(trained: nn.Module) -> None:
        trained(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        torch.optim.SGD(trained.parameters(), lr=0.1).step()

    casts, plain = (
        deviation(tensors(recorded(kind(3, 3).double(), loop=loop, replays=1).steps[0], "output")["", "0"])
        for kind in (Casts, nn.Linear)
    )
    assert casts > 1e-9 > 1e-14 > plain


def test_autocast_is_repeated_in_bfloat16(recorded: Any) -> None:
    def loop(trained: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = trained(tokens(0)).square().mean()
        loss.backward()
        torch.optim.SGD(trained.parameters(), lr=0.1).step()

    step = recorded(model().float(), loop=loop, replays=2).steps[0]
    assert step.autocast == "bfloat16"
    head = tensors(step, "output")["head", "0"]
    assert head.dtype == "bfloat16"
    assert 1e-4 < deviation(head) / of(head).norm < 0.1


# ---- bad usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replays": -1}, "a number of replays"),
        ({"tensors": "whole"}, "'sketch' or 'full'"),
        ({"steps": 7}, "a range or another container"),
        ({"steps": "all"}, "a range or another container"),
        ({"steps": []}, "at least one step"),
        ({"steps": {-1}}, "at least one step"),
        ({"modules": [1]}, "a pattern of module names"),
        ({"modules": None}, "a pattern of module names"),
        ({"modules": []}, "a pattern of module names"),
        ({"modules": "layers.*"}, "a pattern that matches modules of Model"),
        ({"topology": 2}, r"a tpcheck\.Topology"),
        ({"topology": tpcheck.Topology(tp=2)}, "as torch.distributed is not initialised"),
    ],
)
def test_wrong_options_are_refused_before_the_loop(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        tpcheck.record(model(), tmp_path / "run.trace", **options)


def test_a_model_without_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a model with parameters"):
        tpcheck.record(nn.ReLU(), tmp_path / "run.trace")


def test_a_model_that_is_never_called_is_bad_usage(recorded: Any) -> None:
    with pytest.raises(UsageError, match="a model that is called inside the context"):
        recorded(model(), loop=lambda trained: None)


def test_an_optimizer_of_another_model_is_refused(recorded: Any) -> None:
    with pytest.raises(UsageError, match="an optimizer of this model's parameters"):
        recorded(model(), optimizer=torch.optim.SGD(model().parameters(), lr=0.1))


@pytest.mark.parametrize("path", [None, 3, "a\0b"])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    with pytest.raises(UsageError, match=r"path=.*expected a new path"):
        tpcheck.record(model(), path)


def test_a_frozen_model_is_bad_usage(recorded: Any) -> None:
    with pytest.raises(UsageError, match="with gradients"):
        recorded(model().requires_grad_(False), loop=lambda trained: trained(tokens(0)))


def test_an_empty_batch_is_recorded(recorded: Any) -> None:
    trained = model()
    trace = recorded(trained, loop=lambda trained: trained(tokens(0, samples=0)).sum().backward(), replays=1)
    assert next(tensor.shape for tensor in trace.steps[0].tensors if tensor.kind == "output") == (0, 6, 8)


def test_a_model_is_recorded_once_at_a_time(tmp_path: Path) -> None:
    trained = model()
    inner = tpcheck.record(trained.blocks, tmp_path / "inner.trace")
    with tpcheck.record(trained, tmp_path / "run.trace"):
        with pytest.raises(UsageError, match=r"no other tpcheck\.record records a part"):
            inner.__enter__()
        train(trained)
    with tpcheck.record(trained.blocks, tmp_path / "inner.trace"):
        train(trained)


def test_a_context_that_is_entered_again_counts_from_0(tmp_path: Path) -> None:
    trained = model()
    context = tpcheck.record(trained, tmp_path / "run.trace")
    for _ in range(2):
        with context:
            train(trained)
    [trace] = read_trace(tmp_path / "run.trace")
    assert [step.number for step in trace.steps] == [0, 1]


def test_a_guard_does_not_count_replays(tmp_path: Path) -> None:
    trained, logged = model(), list[dict[str, float]]()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    with (
        tpcheck.record(trained, tmp_path / "run.trace", optimizer=optimizer, replays=2),
        tpcheck.guard(trained, optimizer=optimizer, every=2, log=logged.append),
    ):
        train(trained, steps=5, optimizer=optimizer)
    assert [numbers["step"] for numbers in logged] == [0, 1, 2, 4]


@pytest.mark.tpcheck(dp=2)
def test_a_distributed_data_parallel_needs_no_topology_and_may_leave_outputs_unused(
    tp_rank: Rank, tmp_path_factory: pytest.TempPathFactory
) -> None:
    class Pair(Model):
        def forward(self, tokens: torch.Tensor) -> Any:
            logits = super().forward(tokens)
            return logits, logits.sum()

    torch.manual_seed(0)
    trained = nn.parallel.DistributedDataParallel(Pair().double(), find_unused_parameters=True)
    with tpcheck.record(trained, tmp_path_factory.mktemp("ddp") / "run.trace", replays=1):
        trained(tokens(tp_rank.dp_rank))[1].backward()


def test_a_model_whose_weights_differ_where_no_library_shards_it_needs_a_topology(tmp_path: Path) -> None:
    with spawn(tpcheck.Topology(dp=2)) as world, pytest.raises(RankFailure, match=r"topology=None.*no framework"):
        world.run(record_without_topology, str(tmp_path / "run.trace"))


def record_without_topology(rank: Rank, path: str) -> None:
    torch.manual_seed(rank.dp_rank)
    tpcheck.record(Model().double(), path)


# ---- outputs whose shapes leave several readings


class NormAndShard(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        torch.manual_seed(rank)
        self.up = nn.Linear(8, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden).square().sum() + self.up(hidden).square().sum()


def record_norm_and_shard(rank: Rank, path: str) -> None:
    trained = NormAndShard(rank.rank)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    with tpcheck.record(trained, path, optimizer=optimizer, topology=rank.topology):
        for step in range(4):
            trained(torch.randn(3, 8, generator=torch.Generator().manual_seed(step))).backward()
            if step == 2 and rank.rank == 1:
                with torch.no_grad():
                    trained.norm.weight.mul_(2)  # its replicas part: the fourth step's outputs differ
            optimizer.step()
            optimizer.zero_grad()
            torch.distributed.barrier(rank.group("tp"))


def test_an_output_that_all_ranks_have_has_one_reading_from_the_second_step_on(tmp_path: Path) -> None:
    with spawn(tpcheck.Topology(tp=2)) as world:
        world.run(record_norm_and_shard, str(tmp_path / "run.trace"))
    for trace in read_trace(tmp_path / "run.trace"):
        for kind in ("output", "output_gradient"):
            of_steps = [tensors(step, kind) for step in trace.steps]
            assert [len(step["norm", "0"].readings) for step in of_steps] == [2, 1, 1, 1]
            assert [len(step["up", "0"].readings) for step in of_steps] == [2, 2, 2, 2]
        [(label, reason)] = trace.not_recorded.items()
        assert label == "output of norm"
        assert "others in step 3" in reason


# ---- replays that are not the recorded pass


class Counts(nn.Module):
    """Returns what it is given, times a number that grows with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = count()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 1e-3 * next(self.calls))


class KeepsAnAverage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.average += hidden.detach().abs().mean()
        return hidden + self.average


class KeepsLosses(nn.Module):
    """Depends on a counter and on its mode, and keeps losses beside what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.log: list[int] = []
        self.losses: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.log.append(self.calls)
        hidden = hidden * (1 + 0.1 * self.calls) if self.training else hidden
        self.last = hidden.square().mean()
        self.losses.append(hidden.abs().mean())
        return hidden


class OwnNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1e-6 * torch.rand(hidden.shape, generator=self.generator, dtype=hidden.dtype)


class AddsInAnyOrder(nn.Module):
    """Sums in another order in each call, as atomics do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = count()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first = next(self.calls) % 3
        parts = [hidden * 0.1, hidden * 0.7, hidden * 0.3]
        parts = parts[first:] + parts[:first]
        return (parts[0] + parts[1]) + parts[2]


OTHER_PASSES = "replays that are not the recorded pass"


@pytest.mark.parametrize("module", [Counts, KeepsAnAverage, OwnNoise])
def test_a_replay_that_is_not_the_recorded_pass_measures_nothing_and_says_so(module: Any, recorded: Any) -> None:
    trained = model()
    trained.blocks[1].norm = nn.Sequential(trained.blocks[1].norm, module())
    trace = recorded(trained, replays=2)
    assert list(trace.not_recorded) == [OTHER_PASSES]
    assert trace.not_recorded[OTHER_PASSES].startswith("output of blocks.1.norm.1: a replay with the same arguments")
    assert "in 2 steps, the first of which is 0" in trace.not_recorded[OTHER_PASSES]
    assert {reading.deviation for step in trace.steps for each in step.tensors for reading in each.readings} == {None}


def test_a_tensor_of_a_closure_that_changes_after_the_call_is_noticed(recorded: Any) -> None:
    trained = model()
    scale = torch.ones((), dtype=torch.float64)
    trained.blocks[0].norm.register_forward_hook(lambda module, args, output: output * scale)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)

    def loop(trained: nn.Module) -> None:
        for step in range(3):
            trained(tokens(step)).square().mean().backward()
            scale.mul_(1.5 if step == 1 else 1.0)
            optimizer.step()
            optimizer.zero_grad()

    trace = recorded(trained, loop=loop, replays=1, optimizer=optimizer)
    assert "output of blocks.0" in trace.not_recorded[OTHER_PASSES]
    assert trace.not_recorded[OTHER_PASSES].endswith("in step 1")
    measured = [step.tensors[0].readings[0].deviation is not None for step in trace.steps]
    assert measured == [True, False, True]


def changes_the_weights(trained: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    """Sharpness-aware: the second pass is made at other weights than the step."""
    for amount in (0.01, -0.01):
        trained(batch).square().mean().backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter += amount
    optimizer.step()


def penalises_gradients(trained: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    weight = trained.get_parameter("head.weight")
    (gradient,) = torch.autograd.grad(trained(batch).square().mean(), weight, create_graph=True)
    gradient.square().sum().backward()
    optimizer.step()


def adds_a_loss_of_a_closure(trained: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    kept = []
    handle = trained.get_submodule("blocks.0").register_forward_hook(lambda *args: kept.append(args[2].square().mean()))
    (trained(batch).square().mean() + kept[0]).backward()
    optimizer.step()
    handle.remove()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (changes_the_weights, "depends on the weights, which the loop has changed between this call and the optimizer"),
        (penalises_gradients, "is the gradient of a gradient"),
        (adds_a_loss_of_a_closure, "gradients come back through something that neither the model returns"),
    ],
)
def test_why_a_replay_is_not_the_recorded_pass(step: Any, reason: str, recorded: Any) -> None:
    def loop(trained: nn.Module) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for number in range(2):
            step(trained, optimizer, tokens(number))
            optimizer.zero_grad()

    said = recorded(model(), loop=loop, replays=1).not_recorded[OTHER_PASSES]
    assert reason in said
    assert said.endswith("in 2 steps, the first of which is 0")


def test_sums_in_any_order_are_named_nondeterminism_and_are_part_of_what_is_measured(recorded: Any) -> None:
    trained = model()
    trained.blocks[1].norm = nn.Sequential(trained.blocks[1].norm, AddsInAnyOrder())
    trace = recorded(trained, replays=2)
    assert list(trace.not_recorded) == ["bits that repeat"]
    assert "output of blocks.1.norm.1 is not deterministic" in trace.not_recorded["bits that repeat"]
    assert all(deviation(each) > 0 for each in tensors(trace.steps[0], "gradient").values())


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"checkpointing": False}, {"dropout": 0.3}])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_replay_of_a_right_loop_is_the_recorded_pass(options: dict[str, Any], recorded: Any) -> None:
    trace = recorded(model(**options), loop=lambda trained: train(trained, accumulate=2), replays=1)
    assert trace.not_recorded == {}
