"""The doctor predicts the files of each way of saving; tests/model/test_saving.py checks the files."""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.cli.inspect import doctor
from tpcheck.doctor.deepspeed import what_is_saved

TP2 = {"tensor_parallel": {"autotp_size": 2}}
GATHERS = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("config", "writes", "is_model"),
    [
        (TP2, "TP rank 0's shards, as if they were the model: about 1/2 of it", False),
        (TP2 | {"zero_optimization": {"stage": 2}}, "TP rank 0's shards", False),
        (TP2 | {"zero_optimization": {"stage": 3}}, "nothing: stage3_gather_16bit_weights_on_model_save", False),
        (TP2 | {"zero_optimization": GATHERS}, "the whole model", True),
        ({}, "the whole model, as large as without TP: tensor parallelism is off", True),
        ({"tensor_parallel": "x", "zero_optimization": {"stage": "x"}}, "the whole model", True),
    ],
)
def test_what_save_16bit_model_writes(config: dict[str, Any], writes: str, is_model: bool) -> None:
    first = next(iter(what_is_saved(config)))
    assert first.way == "engine.save_16bit_model"
    assert first.writes.startswith(writes)
    assert first.is_model == is_model


def test_the_other_ways_are_listed_where_they_exist() -> None:
    def ways(config: dict[str, Any]) -> list[str]:
        return [saved.way for saved in what_is_saved(config)][1:]

    consolidated = "accelerator.get_state_dict(engine)"
    assert ways({}) == ["engine.save_checkpoint"]
    assert ways(TP2) == [consolidated, "GatherReplacedLayerParams", "engine.save_checkpoint"]
    assert ways({"zero_optimization": {"stage": 1}}) == ["engine.save_checkpoint", "ds_to_universal on that"]
    assert ways(TP2 | {"zero_optimization": {"stage": 3}})[0] == consolidated


def test_the_doctor_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit):
        doctor('{"tensor_parallel": {"autotp_size": 4}, "gradient_clipping": 1.0}')
    printed = capsys.readouterr().out
    assert "files that this configuration saves" in printed
    assert "mp_rank_00 to mp_rank_03, one TP shard each" in printed
