"""Partitions of ZeRO are joined into shards, whatever the ranks, the stage and the padding."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import Shard
from tpcheck.checkpoints.formats.deepspeed.rank_state import Partitions, frozen_shards
from tpcheck.checkpoints.formats.files import Files
from tpcheck.checkpoints.formats.torch_files import load

parameters = st.lists(st.lists(st.integers(1, 4), max_size=2).map(tuple), min_size=1, max_size=4)


def flat_partitions(tensors: list[torch.Tensor], num_ranks: int) -> list[torch.Tensor]:
    """Flatten a parameter group and cut it as ZeRO 1 and 2 do."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * num_ranks)))
    return list(flat.chunk(num_ranks))


def partitions_by_parameter(tensors: list[torch.Tensor], num_ranks: int) -> list[torch.Tensor]:
    """Cut each parameter as ZeRO 3 does, and flatten the parts of each rank."""
    parts = [
        torch.nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % num_ranks)).reshape(num_ranks, -1)
        for tensor in tensors
    ]
    return [torch.cat([part[rank] for part in parts]) for rank in range(num_ranks)]


def loaded(folder: Path, files: Files, states: list[dict[str, Any]]) -> dict[int, Any]:
    torch.save(states, folder / "states.pt")
    return dict(enumerate(load(folder / "states.pt", files, ReadOptions())))


def whole(shard: Shard, files: Files) -> torch.Tensor:
    return shard.read(files, 0, shard.numel).reshape(shard.shape)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=parameters, num_ranks=st.integers(1, 4), stage=st.sampled_from([1, 2, 3]))
def test_every_parameter_is_joined(tmp_path: Path, shapes: list[tuple[int, ...]], num_ranks: int, stage: int) -> None:
    tensors = {f"p{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    cut = partitions_by_parameter if stage == 3 else flat_partitions
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    states = [
        {"optimizer_state_dict": {"zero_stage": stage, "partition_count": num_ranks, key: [flat.clone()]}}
        for flat in cut(list(tensors.values()), num_ranks)
    ]
    files = Files()
    partitions = Partitions(loaded(tmp_path, files, states), dict.fromkeys(range(num_ranks), tmp_path))
    shards = partitions.shards([{name: tensor.shape for name, tensor in tensors.items()}])
    assert partitions.stage == stage
    assert {*shards} == {*tensors}
    assert all(torch.equal(whole(shards[name], files), tensor) for name, tensor in tensors.items())
    files.close()


def test_alignment_paddings_are_skipped(tmp_path: Path, files: Files) -> None:
    flat = torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    state = {"zero_stage": 1, "partition_count": [1], "param_alignment_paddings": [[2, 3]]}
    states = [{"optimizer_state_dict": {**state, "single_partition_of_fp32_groups": [flat]}}]
    shards = Partitions(loaded(tmp_path, files, states), {0: tmp_path}).shards([{"a": (2,), "b": (1,)}])
    assert [whole(shard, files).tolist() for shard in shards.values()] == [[1.0, 2.0], [3.0]]


def test_frozen_parameters_are_joined_from_their_fragments(tmp_path: Path, files: Files) -> None:
    full = torch.arange(5.0)
    fragments = torch.nn.functional.pad(full, (0, 1)).chunk(2)
    states = [
        {"frozen_param_shapes": {"a": full.shape}, "frozen_param_fragments": {"a": fragment.clone()}}
        for fragment in fragments
    ]
    shards = frozen_shards(tmp_path, loaded(tmp_path, files, states))
    assert torch.equal(whole(shards["a"], files), full)
    assert prod(shards["a"].shape) == 5
