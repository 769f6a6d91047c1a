"""The device and backend of each rank follow from the number of GPUs."""

from __future__ import annotations

import socket

import pytest

from tpcheck import UsageError
from tpcheck.world.groups import choose_backend, device_of, reserve_port


@pytest.mark.parametrize(
    ("kind", "num_gpus", "backend"), [("cpu", 0, "gloo"), ("cpu", 8, "gloo"), ("cuda", 2, "nccl"), ("cuda", 1, "gloo")]
)
def test_nccl_is_chosen_where_every_rank_has_its_own_gpu(kind: str, num_gpus: int, backend: str) -> None:
    assert choose_backend(None, kind=kind, num_gpus=num_gpus, num_ranks=2) == backend


def test_nccl_is_refused_where_ranks_share_a_gpu() -> None:
    assert choose_backend("nccl", kind="cuda", num_gpus=2, num_ranks=2) == "nccl"
    with pytest.raises(UsageError, match="expected gloo: 2 ranks on 1 GPUs"):
        choose_backend("nccl", kind="cuda", num_gpus=1, num_ranks=2)


def test_ranks_share_gpus_in_turn() -> None:
    assert [device_of(rank, kind="cuda", num_gpus=2) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of(1, kind="cpu", num_gpus=2) == "cpu"


def test_a_reserved_port_can_be_bound_by_a_server_that_reuses_addresses() -> None:
    with reserve_port() as reserved, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(reserved.getsockname())
        server.listen()
