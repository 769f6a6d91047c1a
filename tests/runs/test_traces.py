"""Training loops are recorded, with and without DeepSpeed, and compared down to the first wrong module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck import Rank, Topology, UsageError, World

Inject = Callable[[Any, Any, Rank], None]  # engine, optimizer, rank


def model() -> Any:
    from tpcheck.families.build import small_model

    torch.manual_seed(0)
    built = small_model("llama").double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


def batches(number: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (2, 8), generator=generator) for _ in range(number)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "reference.trace"
    unsharded = model()
    optimizer = torch.optim.SGD(unsharded.parameters(), lr=0.05)
    before = {name: value.clone() for name, value in unsharded.state_dict().items()}
    with tpcheck.record(unsharded, path):
        for tokens in batches():
            optimizer.zero_grad()
            unsharded(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        after = {name: value.clone() for name, value in unsharded.state_dict().items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # replays leave the model where the loop left it
    assert all(torch.equal(after[name], value) for name, value in unsharded.state_dict().items())
    return path


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    with tpcheck.spawn(Topology(tp=2), timeout=120) as world:
        yield world


def train(rank: Rank, path: Path, inject: Inject | None, number: int) -> None:
    import deepspeed

    from tpcheck.backends.deepspeed.backend import _float64_allowed

    sharded = model()
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.05)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "tensor_parallel": {"autotp_size": 2},
        "zero_allow_untested_optimizer": True,
    }
    with _float64_allowed():
        engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizer, config=config)
        if inject is not None:
            inject(engine, optimizer, rank)
        with tpcheck.record(engine, path):
            for tokens in batches(number):
                engine.backward(engine(input_ids=tokens, labels=tokens).loss)
                engine.step()


def skip_reduce(engine: Any, optimizer: Any, rank: Rank) -> None:
    layer = engine.module.get_submodule("model.layers.1.mlp.down_proj")
    layer.forward = lambda hidden: hidden @ layer.weight.t()


def partial_gradient(engine: Any, optimizer: Any, rank: Rank) -> None:
    share = 0.25 if rank.rank == 0 else 0.75
    engine.module.model.norm.weight.register_hook(lambda gradient: gradient * share)


def faster(engine: Any, optimizer: Any, rank: Rank) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 1.001


def compared(world: World, reference: Path, folder: Path, inject: Inject | None, number: int = 2) -> tpcheck.Report:
    world.run(train, folder / "candidate.trace", inject, number)
    return tpcheck.compare_traces(folder / "candidate.trace", reference)


def test_a_loop_that_is_right_passes_with_everything_compared(two: World, reference: Path, tmp_path: Path) -> None:
    report = compared(two, reference, tmp_path, None)
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total
    assert all(check.compared for check in report.verdict.checks)
    assert max(check.worst_margin for check in report.verdict.checks) < 0.7


@pytest.mark.parametrize(
    ("inject", "check", "place", "cause"),
    [
        (skip_reduce, "outputs_match_reference", "model.layers.1.mlp.down_proj", "missing_reduce"),
        (partial_gradient, "gradients_match_reference", "model.norm", "partial_gradient_on_replica"),
        (faster, "updates_match_reference", None, None),
    ],
)
def test_a_fault_is_found_where_it_is(
    two: World, reference: Path, tmp_path: Path, inject: Inject, check: str, place: str | None, cause: str | None
) -> None:
    first = compared(two, reference, tmp_path, inject).findings[0]
    assert first.check == check
    assert first.margin > 1e3
    if place is not None:
        assert (first.where["module"], first.cause) == (place, cause)


def test_a_shorter_trace_is_compared_as_far_as_it_goes(two: World, reference: Path, tmp_path: Path) -> None:
    report = compared(two, reference, tmp_path, None, number=1)
    assert report.passed
    assert report.verdict.coverage.not_compared == {"step 1": "the trace of the candidate has no step 1"}


def test_different_inputs_are_not_compared(reference: Path, tmp_path: Path) -> None:
    candidate = model()
    with tpcheck.record(candidate, tmp_path / "candidate.trace"):
        tokens = (batches()[0] + 1) % 128
        candidate(input_ids=tokens, labels=tokens).loss.backward()
    report = tpcheck.compare_traces(tmp_path / "candidate.trace", reference)
    assert report.verdict.verdict == "skipped"
    assert (
        report.verdict.message
        == "no replica of the candidate saw the reference's inputs: record both runs on the same batches"
    )


def record_accumulation(path: Path, *, rate: float = 1e-2, steps_after: tuple[int, ...] = (1, 3)) -> Path:
    """Record four backward calls of a linear layer, with an optimizer step after some of them."""
    torch.manual_seed(0)
    layer = nn.Sequential()
    layer.add_module("lm_head", nn.Linear(16, 8, dtype=torch.float64))
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    with tpcheck.record(layer, path):
        for call in range(4):
            layer(torch.randn(4, 16, generator=generator, dtype=torch.float64)).square().mean().backward()
            if call in steps_after:
                optimizer.step()
                optimizer.zero_grad()
    return path


@pytest.fixture
def accumulated(tmp_path: Path) -> Path:
    return record_accumulation(tmp_path / "reference.trace")


def test_a_call_without_an_optimizer_step_has_no_updates_to_compare(accumulated: Path, tmp_path: Path) -> None:
    report = tpcheck.compare_traces(record_accumulation(tmp_path / "candidate.trace"), accumulated)
    assert report.passed, report
    missed = {name: why for name, why in report.verdict.coverage.not_compared.items() if name.startswith("updates")}
    assert missed == {
        f"updates_match_reference: step {step}: weights": "no optimizer step followed this call" for step in (0, 2)
    }
    (updates,) = [check for check in report.verdict.checks if check.check == "updates_match_reference"]
    assert updates.compared == 4  # weight and bias, after two optimizer steps


@pytest.mark.parametrize(
    ("options", "step", "cause"),
    [
        ({"rate": 1.1e-2}, 1, None),
        ({"steps_after": (3,)}, 1, "stale_weight"),
        ({"steps_after": ()}, 1, "stale_weight"),
        ({"steps_after": (0, 1, 2, 3)}, 0, None),
    ],
)
def test_a_wrong_update_after_a_call_without_a_step_is_found(
    accumulated: Path, tmp_path: Path, options: dict[str, Any], step: int, cause: str | None
) -> None:
    from typer.testing import CliRunner

    from tpcheck.cli import app

    candidate = record_accumulation(tmp_path / "candidate.trace", **options)
    first = tpcheck.compare_traces(candidate, accumulated).findings[0]
    assert (first.check, first.where["step"], first.cause) == ("updates_match_reference", step, cause)
    assert first.margin > 1e3
    result = CliRunner().invoke(app, ["compare", str(candidate), str(accumulated)])
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_what_cannot_be_recorded_is_bad_usage(tmp_path: Path) -> None:
    quiet = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="called inside the context"), tpcheck.record(quiet, tmp_path / "x.trace"):
        pass
    noisy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with tpcheck.record(noisy, tmp_path / "dropout.trace"):
        noisy(torch.ones(1, 2)).sum().backward()  # the generator is set back for replays
    with pytest.raises(UsageError, match="a model with parameters"), tpcheck.record(nn.ReLU(), tmp_path / "x.trace"):
        pass
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="a new path"):
        tpcheck.record(quiet, tmp_path / "notes")


def test_a_loop_that_raises_writes_nothing_and_keeps_the_older_trace(tmp_path: Path) -> None:
    layer, path = nn.Linear(2, 2), tmp_path / "x.trace"
    with tpcheck.record(layer, path):
        layer(torch.ones(1, 2))
    written = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(RuntimeError), tpcheck.record(layer, path):
        layer(torch.zeros(1, 3))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.trace"]


def test_the_command_line_compares_two_traces(reference: Path) -> None:
    from typer.testing import CliRunner

    from tpcheck.cli import app

    same = CliRunner().invoke(app, ["compare", str(reference), str(reference)])
    assert same.exit_code == 0, same.output
    wrong = CliRunner().invoke(app, ["compare", str(reference), "nowhere.trace"])
    assert wrong.exit_code == 2
    assert "reference='nowhere.trace': expected a folder that tpcheck.record has written" in wrong.output
