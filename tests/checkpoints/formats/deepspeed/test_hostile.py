"""Damaged and hostile DeepSpeed checkpoints end in one sentence, and nothing of them is run or followed."""

from __future__ import annotations

import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.malformed import RemovesFile, assert_refused
from tests.checkpoints.reading import open_source, read_all
from tests.checkpoints.small_states import affine, model_states, optimizer_states, piece


@pytest.fixture
def training(tmp_path: Path) -> Path:
    step = tmp_path / "root" / "global_step1"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("global_step1")
    for rank in (0, 1):
        torch.save(model_states(rank), step / f"mp_rank_0{rank}_model_states.pt")
        torch.save(optimizer_states(rank), step / f"zero_pp_rank_0_mp_rank_0{rank}_optim_states.pt")
    return step.parent


MODEL = "global_step1/mp_rank_01_model_states.pt"
OPTIMIZER = "global_step1/zero_pp_rank_0_mp_rank_01_optim_states.pt"


def test_the_undamaged_checkpoint_is_read(training: Path) -> None:
    whole = read_all(training)
    assert torch.equal(whole["cut.weight"], torch.arange(16.0).reshape(4, 4))
    assert torch.equal(whole["norm"], torch.ones(4))


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("../..", "names a file '../..', which is outside of it"),
        ("/etc", "names a file '/etc', which is outside of it"),
        ("global_step1\n/..", "no such folder|is outside of it"),
        ("global_step2", "names 'global_step2', but there is no such folder"),
        ("\0", "is not a file name"),
        ("", "latest is empty"),
        ("x" * 300, "no such folder|cannot be resolved"),
        ("x" * 5000, "is not a file name"),
    ],
)
def test_latest_cannot_lead_out(training: Path, tag: str, message: str) -> None:
    (training / "latest").write_text(tag)
    assert_refused(training, message)


def test_latest_cannot_lead_out_through_a_link(training: Path, tmp_path: Path) -> None:
    shutil.move(training / "global_step1", tmp_path / "elsewhere")
    (training / "global_step1").symlink_to(tmp_path / "elsewhere")
    assert_refused(training, "is a link out of the folder")


def test_latest_may_not_be_a_folder(training: Path) -> None:
    (training / "latest").unlink()
    (training / "latest").mkdir()
    assert_refused(training, "latest is a folder, where a file should be")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no mp rank 1": (
        lambda root: (root / MODEL).unlink(),
        "only one of model states and optimizer states of mp rank 1",
    ),
    "no optimizer states of mp rank 1": (lambda root: (root / OPTIMIZER).unlink(), "states of mp rank 1"),
    "neither": (lambda root: [(root / MODEL).unlink(), (root / OPTIMIZER).unlink()], "saved with mp_world_size 2"),
    "a rank left over": (
        lambda root: shutil.copy(root / MODEL, root / "global_step1/mp_rank_03_model_states.pt"),
        "holds no file like mp_rank_00_model_states.pt for mp rank 2",
    ),
    "truncated model states": (lambda root: os.truncate(root / MODEL, 700), "mp_rank_01_model_states.pt"),
    "truncated optimizer states": (lambda root: os.truncate(root / OPTIMIZER, 700), "mp_rank_01_optim_states.pt"),
    "empty model states": (lambda root: os.truncate(root / MODEL, 0), "model_states.pt is empty"),
    "a folder for model states": (
        lambda root: [(root / MODEL).unlink(), (root / MODEL).mkdir()],
        "is a folder, where a file should be",
    ),
    "a dangling link": (
        lambda root: [(root / MODEL).unlink(), (root / MODEL).symlink_to("nowhere")],
        "model_states.pt cannot be opened",
    ),
    "of pipeline parallelism": (
        lambda root: (root / "global_step1/layer_00-model_00-model_states.pt").touch(),
        "was saved with pipeline parallelism",
    ),
    "of two stages": (
        lambda root: (root / "global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt").touch(),
        "files of different saves",
    ),
    "of two precisions": (
        lambda root: (root / "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch(),
        "of the same rank",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(training: Path, damage: str) -> None:
    damage_folder, message = DAMAGES[damage]
    damage_folder(training)
    assert_refused(training, message)


HUGE = 1 << 50

BAD_MODEL_STATES: dict[str, tuple[Any, str]] = {
    "a list": ([1], "does not hold a state of DeepSpeed, but an object of type list"),
    "no module": (model_states(1, module=None), "its entry 'module' is missing"),
    "a weight without a name": (model_states(1, module={3: torch.ones(1)}), "has a weight without a name: 3"),
    "another step": (model_states(1, global_steps=2), "they are of different saves"),
    "another world": (model_states(1, mp_world_size=4), "they are of different saves"),
    "another layout": (model_states(1, universal_checkpoint_info={}), "state different layouts of the parameters"),
    "no shapes": (model_states(1, param_shapes=None), "have no param_shapes"),
    "shapes of nothing": (model_states(1, param_shapes=[{"norm": "4"}]), "are not names with shapes"),
    "negative shapes": (model_states(1, param_shapes=[{"norm": [-4]}]), "are not names with shapes"),
    "huge shapes": (model_states(1, param_shapes=[{"norm": [HUGE, HUGE]}]), "hold 12 elements"),
    "more groups": (
        model_states(1, param_shapes=[{"norm": [4]}, {"cut.weight": [8]}]),
        "has 1 groups, but",
    ),
}


@pytest.mark.parametrize("case", BAD_MODEL_STATES)
def test_contradictory_model_states_are_refused(training: Path, case: str) -> None:
    state, message = BAD_MODEL_STATES[case]
    torch.save(state, training / MODEL)
    assert_refused(training, message)


BAD_OPTIMIZER_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "no stage": ({"zero_stage": None}, "do not state their ZeRO stage"),
    "stage 7": ({"zero_stage": 7}, "do not state their ZeRO stage"),
    "more ranks": ({"partition_count": [2]}, "of 1 data-parallel ranks, but .* was saved with 2"),
    "ranks that are none": ({"partition_count": [[]]}, "was saved with"),
    "no partitions": ({"single_partition_of_fp32_groups": None}, "no flat tensors"),
    "partitions of text": ({"single_partition_of_fp32_groups": ["x"]}, "no flat tensors"),
    "partitions of two dims": ({"single_partition_of_fp32_groups": [torch.ones(3, 4)]}, "no flat tensors"),
    "too short": (
        {"single_partition_of_fp32_groups": [torch.ones(8)]},
        "hold 8 elements, but their parameters have 12",
    ),
    "too long": ({"single_partition_of_fp32_groups": [torch.ones(20)]}, "hold 20 elements"),
    "odd padding": (
        {"param_alignment_paddings": [[-1, 0]]},
        "not state the padding of the 2 parameters",
    ),
    "huge padding": ({"param_alignment_paddings": [[HUGE, 0]]}, "hold 12 elements"),
}


@pytest.mark.parametrize("case", BAD_OPTIMIZER_STATES)
def test_contradictory_optimizer_states_are_refused(training: Path, case: str) -> None:
    changes, message = BAD_OPTIMIZER_STATES[case]
    torch.save(optimizer_states(1, **changes), training / OPTIMIZER)
    assert_refused(training, message)


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_no_code_of_a_state_is_run(training: Path, tmp_path: Path, file: str) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    torch.save({"module": {"a": RemovesFile(victim)}}, training / file)
    assert_refused(training, r"run (posix|os)\.remove; .*--allow-pickle")
    assert victim.exists()


def test_objects_of_a_trainer_are_read_only_if_pickles_are_allowed(training: Path) -> None:
    torch.save(model_states(1, args=Namespace(lr=0.1)), training / MODEL)
    assert_refused(training, r"run argparse\.Namespace; if you trust the file, --allow-pickle")
    checkpoint = open_source(training, allow_pickle=True)
    assert torch.equal(checkpoint.read("cut.weight", range(4)), torch.arange(16.0).reshape(4, 4))
    checkpoint.close()


BAD_LAYOUTS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "is not made of sizes"),
    "one rank": (affine(ranks={0: {}}), "was cut for ranks"),
    "text": (affine(ranks="01"), "was cut for ranks"),
    "a shape of text": (affine(logical_shape="44"), "is not made of sizes"),
    "huge": (affine(logical_shape=[HUGE, 4]), "leave out row 4"),
    "smaller": (affine(logical_shape=[3, 4]), "reaches element 15 of 12"),
    "another shard": (
        affine(ranks={rank: {"shard_shape": [4, 2], "pieces": [piece(rank)]} for rank in (0, 1)}),
        r"holds the shape \[2, 4\], but the layout states \[4, 2\]",
    ),
    "overlapping": (
        affine(
            ranks={rank: {"shard_shape": [2, 4], "pieces": [piece(rank, source=[4 * rank, [4, 1]])]} for rank in (0, 1)}
        ),
        "repeat row 1",
    ),
    "no pieces": (affine(ranks={rank: {"shard_shape": [2, 4], "pieces": 3} for rank in (0, 1)}), "pieces have 0"),
    **{
        message: (
            affine(ranks={rank: {"shard_shape": [2, 4], "pieces": [piece(rank, **changes)]} for rank in (0, 1)}),
            message,
        )
        for changes, message in (
            ({"source": [-1, [4, 1]]}, "no offset or strides"),
            ({"source": None}, "no offset or strides"),
            ({"source": [2, [4, 1]]}, "a row of it runs into the next row"),
            ({"source": [8, [4, 0]]}, "a stride below 1"),
            ({"source": [0, [4, -1]]}, "is not made of sizes"),
            ({"source": [0, [HUGE, 1]]}, "reaches element"),
            ({"dest": [4, [4, 1]]}, "reaches element 11 of 8"),
            ({"dest": [0, [1, 2]]}, "are not adjacent"),
            ({"dest": [0, [4]]}, "different numbers of dims"),
            ({"shape": [2, 3]}, "holds 8 elements, but its pieces have 6"),
            ({"shape": [True, 8]}, "is not made of sizes"),
            ({"scale": 0}, "no scale"),
            ({"scale": float("inf")}, "no scale"),
        )
    },
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_impossible_layouts_are_unread(training: Path, case: str) -> None:
    layout, message = BAD_LAYOUTS[case]
    for rank in (0, 1):
        state = model_states(rank)
        state["universal_checkpoint_info"]["affine_map"]["params"][r"^cut\.weight$"] = layout
        torch.save(state, training / f"global_step1/mp_rank_0{rank}_model_states.pt")
    checkpoint = open_source(training)
    assert checkpoint.names() == ("norm",)
    assert re.search(message, checkpoint.unread["cut.weight"])


# --- DeepSpeed universal checkpoints -----------------------------------------------------------------------------


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "universal"
    (folder / "zero" / "norm").mkdir(parents=True)
    torch.save({"param": torch.ones(4)}, folder / "zero/norm/fp32.pt")
    torch.save(model_states(0), folder / "mp_rank_00_model_states.pt")
    return folder


def test_contradictory_universal_checkpoints_are_refused(universal: Path, tmp_path: Path) -> None:
    file = universal / "zero/norm/fp32.pt"
    assert torch.equal(read_all(universal)["norm"], torch.ones(4))
    torch.save({"param": 3}, file)
    assert_refused(universal, "fp32.pt holds no tensor under 'param'")
    victim = tmp_path / "victim"
    victim.touch()
    torch.save({"param": RemovesFile(victim)}, file)
    assert_refused(universal, r"fp32.pt is refused, because reading it would run (posix|os)\.remove")
    assert victim.exists()
    torch.save(torch.ones(3), file)
    torch.save(model_states(0, mp_world_size=1), universal / "mp_rank_00_model_states.pt")
    assert_refused(universal, r"has 3 elements, but the model states state the shape \[4\]")
    file.unlink()
    file.mkdir()
    assert_refused(universal, "is a folder, where a file should be")


def test_a_parameter_without_weights_is_refused(universal: Path) -> None:
    (universal / "zero" / "other").mkdir()
    assert_refused(universal, "other/fp32.pt cannot be opened")


def test_a_parameter_s_folder_may_not_be_a_link_out(universal: Path, tmp_path: Path) -> None:
    shutil.move(universal / "zero/norm", tmp_path / "elsewhere")
    (universal / "zero/norm").symlink_to(tmp_path / "elsewhere")
    assert_refused(universal, "whose folder is a link out of it")


def test_latest_universal_cannot_lead_out(universal: Path) -> None:
    (universal.parent / "latest_universal").write_text("../..")
    assert_refused(universal.parent, "which is outside of it")
