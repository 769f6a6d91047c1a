"""Files are assigned to ranks by their names, and a missing file is named by its rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcheck import CheckpointError
from tpcheck.checkpoints.formats.deepspeed.rank_files import looks_like_training, training_folder


def model_name(tp_rank: int, dp_rank: int | None = None) -> str:
    partition = "" if dp_rank is None else f"zero_pp_rank_{dp_rank}_"
    return f"{partition}mp_rank_{tp_rank:02}_model_states.pt"


def optimizer_name(tp_rank: int, dp_rank: int, prefix: str = "") -> str:
    return f"{prefix}zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02}_optim_states.pt"


def folder_with(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).touch()
    return path


def test_files_are_sorted_by_rank(tmp_path: Path) -> None:
    names = [model_name(tp_rank) for tp_rank in range(2)]
    names += [optimizer_name(tp_rank, dp_rank, "bf16_") for tp_rank in range(2) for dp_rank in range(3)]
    folder = training_folder(folder_with(tmp_path, *names, "expert_0_mp_rank_00_model_states.pt", "other.pt"))
    assert (folder.tp, folder.partitioned, folder.experts) == (2, False, ("expert_0_mp_rank_00_model_states.pt",))
    assert folder.models[1] == {0: tmp_path / model_name(1)}
    assert folder.optimizers[1][2] == tmp_path / optimizer_name(1, 2, "bf16_")


def test_model_states_of_every_rank_are_zero_3(tmp_path: Path) -> None:
    names = [model_name(0, dp_rank) for dp_rank in range(2)]
    assert training_folder(folder_with(tmp_path, *names)).partitioned


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([model_name(1)], r"no file like mp_rank_01_model_states\.pt for mp rank 0\."),
        ([model_name(0), model_name(999_999_999)], "for mp rank 1"),
        ([model_name(0, 0), model_name(0, 1), model_name(1, 0)], "for mp rank 1, dp rank 1"),
        ([model_name(0), optimizer_name(0, 0), optimizer_name(1, 0)], "model states and optimizer states of mp rank 1"),
        ([model_name(0), optimizer_name(0, 0), optimizer_name(0, 0, "bf16_")], "of the same rank"),
        ([model_name(0), model_name(0, 0)], "files of different saves"),
        ([model_name(0), "layer_01-model_00-model_states.pt"], "pipeline parallelism"),
        (["other.pt"], "holds no model states"),
    ],
)
def test_a_missing_or_doubled_file_is_an_error(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        training_folder(folder_with(tmp_path, *names))


def test_a_training_checkpoint_is_recognised_by_its_step_or_by_latest(tmp_path: Path) -> None:
    step = tmp_path / "global_step2"
    step.mkdir()
    folder_with(step, model_name(0))
    assert looks_like_training(step)
    assert not looks_like_training(tmp_path)
    (tmp_path / "latest").write_text("global_step2")
    assert looks_like_training(tmp_path)
