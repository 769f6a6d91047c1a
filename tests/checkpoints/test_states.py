"""Optimizers, schedulers, counts and generators are compared where both sides have them, whatever saved them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from tests.checkpoints.small_states import model_states, optimizer_states
from tpcheck import CheckpointError, Report, verify_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

MODEL = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8))
OPTIMIZER = torch.optim.AdamW(MODEL.parameters(), lr=1e-3)
SCHEDULER = torch.optim.lr_scheduler.StepLR(OPTIMIZER, 2)
torch.manual_seed(2)
MODEL(torch.randn(5, 4)).square().sum().backward()
OPTIMIZER.step()
NAMES = tuple(name for name, _ in MODEL.named_parameters())


def generators(seed: int) -> dict[str, Any]:
    state = {"python": random.Random(seed).getstate(), "numpy": np.random.RandomState(seed).get_state()}
    return {**state, "cpu": torch.Generator().manual_seed(seed).get_state()}


def states() -> dict[str, Any]:
    """Return what a trainer saves: a copy that a test may change."""
    return {
        "model": {name: value.clone() for name, value in MODEL.state_dict().items()},
        "optimizer": copy.deepcopy(OPTIMIZER.state_dict()),
        "scheduler": copy.deepcopy(SCHEDULER.state_dict()),
        "global_step": 3,
        "generators": [generators(0), generators(1)],
    }


def by_name(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state dict as `get_optimizer_state_dict` of torch has it."""
    groups = [{**group, "params": [NAMES[number] for number in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {NAMES[key]: value for key, value in optimizer["state"].items()}, "param_groups": groups}


def trainer_folder(saved: dict[str, Any], folder: Path) -> Path:
    """Write the files of transformers' Trainer."""
    folder.mkdir()
    save_file(saved["model"], folder / "model.safetensors")
    torch.save(saved["optimizer"], folder / "optimizer.pt")
    torch.save(saved["scheduler"], folder / "scheduler.pt")
    for rank, state in enumerate(saved["generators"]):
        torch.save(state, folder / f"rng_state_{rank}.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": saved["global_step"], "epoch": 0.5}))
    return folder


def torch_file(saved: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    entries = {key: saved[key] for key in ("model", "optimizer", "scheduler", "global_step")}
    torch.save(entries, folder / "last.pt")
    return folder / "last.pt"


def dcp_folder(saved: dict[str, Any], folder: Path) -> Path:
    entries = {key: saved[key] for key in ("model", "scheduler", "global_step")}
    dcp.save({**entries, "optimizer": by_name(saved["optimizer"])}, checkpoint_id=folder, no_dist=True)
    return folder


def flat_dcp_folder(saved: dict[str, Any], folder: Path) -> Path:
    optimizer = by_name(saved["optimizer"])
    flat = {
        f"optimizer.state.{name}.{kind}": value
        for name, kinds in optimizer["state"].items()
        for kind, value in kinds.items()
    }
    lr = {"optimizer.param_groups.0.lr": optimizer["param_groups"][0]["lr"]}
    dcp.save({**saved["model"], **flat, **lr}, checkpoint_id=folder, no_dist=True)
    return folder


Save = Callable[[dict[str, Any], Path], Path]
EVERY_WAY = [trainer_folder, torch_file, dcp_folder, flat_dcp_folder]
WITH_ALL = EVERY_WAY[:3]


def compared(save: Save, folder: Path, change: Callable[[dict[str, Any]], None], **options: Any) -> Report:
    """Compare what is saved after a change with what is saved before."""
    changed = states()
    change(changed)
    return verify_checkpoint(save(changed, folder / "actual"), save(states(), folder / "reference"), **options)


def found(report: Report) -> dict[str, str | None]:
    return {" ".join(filter(None, (f.where.get("parameter"), f.where.get("field")))): f.cause for f in report.findings}


@pytest.mark.parametrize("save", EVERY_WAY)
def test_equal_states_pass_and_are_counted(save: Save, tmp_path: Path) -> None:
    report = compared(save, tmp_path, lambda saved: None)
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared == report.verdict.coverage.total >= 12
    assert not report.verdict.coverage.not_compared


@pytest.mark.parametrize("save", EVERY_WAY)
def test_a_moment_that_differs_is_found_and_explained(save: Save, tmp_path: Path) -> None:
    def zero(saved: dict[str, Any]) -> None:
        saved["optimizer"]["state"][2]["exp_avg"].zero_()

    (finding,) = compared(save, tmp_path, zero).findings
    assert (finding.where["field"], finding.cause) == ("exp_avg", "all_zero")
    assert finding.where["parameter"] == ("parameter 2" if save is trainer_folder else "1.weight")


@pytest.mark.parametrize("save", EVERY_WAY)
def test_moments_of_another_rank_are_named(save: Save, tmp_path: Path) -> None:
    def repeat(saved: dict[str, Any]) -> None:
        moment = saved["optimizer"]["state"][2]["exp_avg_sq"]
        moment[4:] = moment[:4]

    (finding,) = compared(save, tmp_path, repeat).findings
    assert finding.cause == "optimizer_state_of_another_rank"
    assert finding.evidence["story"]["order"] == [0, 0]


def test_weights_with_the_same_mistake_make_it_one_of_the_layout(tmp_path: Path) -> None:
    def swap(saved: dict[str, Any]) -> None:
        for tensor in (saved["model"]["1.weight"], saved["optimizer"]["state"][2]["exp_avg"]):
            tensor.copy_(tensor.roll(4, 0))

    assert {*found(compared(torch_file, tmp_path, swap)).values()} == {"shard_order_swapped"}


@pytest.mark.parametrize("save", WITH_ALL)
def test_options_counts_and_schedules_are_compared(save: Save, tmp_path: Path) -> None:
    def change(saved: dict[str, Any]) -> None:
        saved["optimizer"]["param_groups"][0]["lr"] = 2e-3
        saved["optimizer"]["param_groups"][0]["foreach"] = True  # how, not what
        saved["scheduler"]["last_epoch"] = 7
        saved["global_step"] = 4
        for state in saved["optimizer"]["state"].values():
            state["step"] += 1

    report = compared(save, tmp_path, change)
    expected = {"scheduler.last_epoch": None, "number of steps": None, "optimizer step": None}
    assert found(report) == {"optimizer group 0 lr": "options_differ", **expected}
    text = report.to_text()
    assert "1 value differs: options_differ" in text
    assert "scheduler.last_epoch 7, expected 0" in text


def test_a_step_count_of_one_parameter_is_compared_by_name(tmp_path: Path) -> None:
    def change(saved: dict[str, Any]) -> None:
        saved["optimizer"]["state"][1]["step"] += 1

    assert found(compared(torch_file, tmp_path, change)) == {"0.bias step": None}


@pytest.mark.parametrize("kind", ["python", "numpy", "cpu"])
def test_the_generators_of_each_rank_are_compared(kind: str, tmp_path: Path) -> None:
    def change(saved: dict[str, Any]) -> None:
        saved["generators"][1] = {**generators(1), kind: generators(0)[kind]}

    (finding, *_) = compared(trainer_folder, tmp_path, change).findings
    assert str(finding.where["field"]).startswith(f"generators.1.{kind}")


def test_generators_of_ranks_that_one_side_lacks_are_not_compared(tmp_path: Path) -> None:
    def drop(saved: dict[str, Any]) -> None:
        del saved["generators"][1]

    report = compared(trainer_folder, tmp_path, drop)
    assert report.passed
    assert report.verdict.coverage.not_compared["generators.1.cpu"] == "only the reference has it"


@pytest.mark.parametrize("save", EVERY_WAY)
def test_a_moment_that_is_not_saved_is_found(save: Save, tmp_path: Path) -> None:
    def drop(saved: dict[str, Any]) -> None:
        del saved["optimizer"]["state"][2]["exp_avg"]

    (finding,) = compared(save, tmp_path, drop).findings
    assert (finding.where["field"], finding.cause) == ("exp_avg", "tensor_missing")


def test_formats_that_name_parameters_are_compared_with_each_other(tmp_path: Path) -> None:
    report = verify_checkpoint(torch_file(states(), tmp_path / "a"), dcp_folder(states(), tmp_path / "b"))
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared == 12
    report = verify_checkpoint(torch_file(states(), tmp_path / "c"), trainer_folder(states(), tmp_path / "d"))
    assert report.passed
    assert report.verdict.coverage.not_compared["parameter 0 exp_avg"] == "only the reference has it"


def test_states_of_one_side_are_said_to_be_not_compared_and_can_be_left_out(tmp_path: Path) -> None:
    saved = trainer_folder(states(), tmp_path / "a")
    missed = verify_checkpoint(saved, MODEL).verdict.coverage.not_compared
    assert missed == {"training states of actual": "the reference has none"}
    missed = verify_checkpoint(MODEL, saved).verdict.coverage.not_compared
    assert missed == {"training states of the reference": "actual has none"}
    assert not verify_checkpoint(saved, MODEL, weights_only=True).verdict.coverage.not_compared


def of_one_rank(saved: dict[str, Any], *, parameters: tuple[tuple[int, int], ...] = ((0, 0), (1, 0), (2, 1))) -> None:
    """Keep the first rank's shard of moments: columns of the second layer, rows of the first."""
    for number, dim in parameters:
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = saved["optimizer"]["state"][number][kind]
            saved["optimizer"]["state"][number][kind] = moment.chunk(2, dim)[0].clone()


@pytest.mark.parametrize("save", EVERY_WAY)
def test_an_optimizer_file_of_one_rank_beside_whole_weights_is_found_by_itself(save: Save, tmp_path: Path) -> None:
    saved = states()
    of_one_rank(saved)
    report = verify_checkpoint(save(saved, tmp_path / "actual"), MODEL)
    assert len(report.findings) == 6
    assert {finding.cause for finding in report.findings} == {"optimizer_state_of_another_rank"}
    assert report.findings[0].evidence["story"] == {"shape_shard": [3, 4], "shape_whole": [6, 4], "tp": 2}
    assert verify_checkpoint(tmp_path / "actual", MODEL, weights_only=True).passed if save is trainer_folder else True


@pytest.mark.parametrize("save", EVERY_WAY)
def test_shards_of_one_rank_beside_right_weights_are_compared_with_whole_moments(save: Save, tmp_path: Path) -> None:
    report = compared(save, tmp_path, of_one_rank)
    assert {*found(report).values()} == {"optimizer_state_of_another_rank"}
    assert len(report.findings) == 6


@pytest.mark.parametrize("save", EVERY_WAY)
def test_shards_of_one_rank_in_the_reference_are_not_compared(save: Save, tmp_path: Path) -> None:
    wrong = states()
    of_one_rank(wrong)
    report = verify_checkpoint(save(states(), tmp_path / "actual"), save(wrong, tmp_path / "reference"))
    assert report.passed, report.to_text()
    why = "the reference has one rank's shard of it alone"
    assert [*report.verdict.coverage.not_compared.values()].count(why) == 6


def test_shards_are_recognised_where_one_has_the_shape_of_another_weight(tmp_path: Path) -> None:
    """Of 8 x 4, 4 x 4 and 2 x 4, the halves are 4 x 4, 2 x 4 and 1 x 4: of these only the last is no weight's."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    weights = model.state_dict()
    halves = {number: {"momentum_buffer": weight.chunk(2)[0].clone()} for number, weight in enumerate(weights.values())}
    saved = {**states(), "model": weights, "optimizer": {"state": halves, "param_groups": [{"lr": 0.1}]}}
    report = verify_checkpoint(trainer_folder(saved, tmp_path / "actual"), model)
    stories = [finding.evidence["story"] for finding in report.findings]
    assert [(story["shape_shard"], story["shape_whole"]) for story in stories] == [
        ([4, 4], [8, 4]), ([2, 4], [4, 4]), ([1, 4], [2, 4])
    ]  # fmt: skip


def test_an_optimizer_that_is_saved_without_its_states_is_found(tmp_path: Path) -> None:
    report = compared(trainer_folder, tmp_path, lambda saved: saved["optimizer"]["state"].clear())
    assert {*found(report).values()} == {"tensor_missing"}
    assert len(report.findings) == 8


def test_generators_of_another_rank_are_named_and_advised_on(tmp_path: Path) -> None:
    def repeat(saved: dict[str, Any]) -> None:
        saved["generators"][1] = saved["generators"][0]

    report = compared(trainer_folder, tmp_path, repeat)
    assert len(report.findings) >= 3
    assert {finding.cause for finding in report.findings} == {None}
    notes = {finding.where["field"]: finding.evidence.get("note") for finding in report.findings}
    assert notes["generators.1.cpu"] == "it is in the state of rank 0's"
    assert "of each rank" in report.findings[0].evidence["advice"]


def test_numbered_moments_of_weights_with_the_same_mistake_are_of_the_layout(tmp_path: Path) -> None:
    def swap(saved: dict[str, Any]) -> None:
        for tensor in (saved["model"]["1.weight"], saved["optimizer"]["state"][2]["exp_avg"]):
            tensor.copy_(tensor.roll(4, 0))

    assert {*found(compared(trainer_folder, tmp_path, swap)).values()} == {"shard_order_swapped"}


def test_dtensors_of_one_rank_are_found_by_their_own_shape(tmp_path: Path) -> None:
    saved = states()
    save = trainer_folder(saved, tmp_path / "actual")
    torch.save(with_dtensors(saved["optimizer"]), save / "optimizer.pt")
    report = verify_checkpoint(save, MODEL)
    assert found(report) == {"parameter 0 exp_avg": "optimizer_state_of_another_rank"}


def with_dtensors(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict with a DTensor of which this process has the first of two ranks' shards."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        whole = optimizer["state"][0]["exp_avg"]
        spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(whole.shape, whole.stride(), whole.dtype))
        optimizer["state"][0]["exp_avg"] = DTensor(whole.chunk(2)[0], spec, requires_grad=False)
        return optimizer
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: state.update({2: {kind: value[:3] for kind, value in state[2].items() if value.dim()}}), "n"),
        (lambda state: state.pop(2), "a frozen weight"),
    ],
)
def test_shapes_that_are_not_those_of_shards_of_all_ranks_say_nothing(
    change: Callable[[dict[int, Any]], Any], why: str, tmp_path: Path
) -> None:
    saved = states()
    of_one_rank(saved, parameters=((0, 0),) if why == "a frozen weight" else ())
    change(saved["optimizer"]["state"])
    assert verify_checkpoint(trainer_folder(saved, tmp_path / "actual"), MODEL).passed


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


def test_states_that_would_run_code_are_refused(tmp_path: Path) -> None:
    right = trainer_folder(states(), tmp_path / "right")
    hostile = trainer_folder(states(), tmp_path / "hostile")
    torch.save({"state": {}, "param_groups": [Hostile()]}, hostile / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer.pt is refused, because reading it would run builtins.eval"):
        verify_checkpoint(hostile, right)
    assert "refused" in verify_checkpoint(hostile, MODEL).verdict.coverage.not_compared["training states of actual"]
    assert verify_checkpoint(hostile, right, weights_only=True).passed


def test_a_damaged_file_of_states_is_an_error(tmp_path: Path) -> None:
    right, damaged = trainer_folder(states(), tmp_path / "a"), trainer_folder(states(), tmp_path / "b")
    data = (damaged / "optimizer.pt").read_bytes()
    (damaged / "optimizer.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        verify_checkpoint(damaged, right)


# ---- DeepSpeed, in the files of two TP ranks


def deepspeed_folder(
    folder: Path, zero: int, change: Callable[[int, torch.Tensor], torch.Tensor] | None = None
) -> Path:
    """Write the files of two TP ranks; `change` may change a rank's moments."""
    folder.mkdir()
    for rank in range(2):
        moment = torch.cat([torch.arange(8.0) + 8 * rank + 100, torch.full((4,), 7.0)])
        moment = moment if change is None else change(rank, moment)
        group = {"lr": 1e-3, "params": [0]}
        if zero == 0:
            by_number = {
                0: {"step": torch.tensor(2.0), "exp_avg": moment[:8].reshape(2, 4)},
                1: {"exp_avg": moment[8:]},
            }
            states = model_states(rank, optimizer={"state": by_number, "param_groups": [group]})
        else:
            states = model_states(rank)
            base = {"state": {0: {"step": torch.tensor(2.0), "exp_avg": moment}}, "param_groups": [group]}
            key = {3: "optimizer_state_dict"}.get(zero, "base_optimizer_state")
            partitions = optimizer_states(rank, **{key: base})
            inner = partitions["optimizer_state_dict"]
            if zero == 3:
                inner |= {"zero_stage": 3, "fp32_flat_groups": inner.pop("single_partition_of_fp32_groups")}
            name = f"zero_pp_rank_0_mp_rank_{rank:02}_optim_states.pt"
            torch.save({"optimizer_state_dict": {**inner, "partition_count": 1 if zero == 3 else [1]}}, folder / name)
        prefix = "zero_pp_rank_0_" if zero == 3 else ""
        states["lr_scheduler"] = {"last_batch_iteration": 1}
        torch.save(states, folder / f"{prefix}mp_rank_{rank:02}_model_states.pt")
    return folder


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_moments_of_deepspeed_are_merged_as_the_weights_are(zero: int, tmp_path: Path) -> None:
    right = deepspeed_folder(tmp_path / "right", zero)
    other = deepspeed_folder(tmp_path / "other", 1)
    report = verify_checkpoint(right, other)
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared == 4
    swapped = deepspeed_folder(
        tmp_path / "wrong", zero, lambda rank, moment: torch.cat([moment[:8] - 8 * rank, moment[8:]])
    )
    (finding,) = verify_checkpoint(swapped, right).findings
    assert (finding.where["parameter"], finding.where["field"]) == ("cut.weight", "exp_avg")
    assert finding.cause == "optimizer_state_of_another_rank"


def test_the_trainer_s_folder_has_the_states_of_deepspeed_that_lie_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    save_file({"cut.weight": torch.arange(16.0).reshape(4, 4), "norm": torch.ones(4)}, folder / "model.safetensors")
    deepspeed_folder(folder / "global_step2", 1)
    (folder / "latest").write_text("global_step2")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    report = verify_checkpoint(folder, deepspeed_folder(tmp_path / "steps", 1))
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared == 4
