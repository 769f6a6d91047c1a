"""Functions that the tests of this folder run on ranks."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, ClassVar

from tpcheck import Rank


def all_reduce(rank: Rank) -> int:
    import torch

    number = torch.tensor(rank.rank + 1)
    torch.distributed.all_reduce(number)
    return int(number)


def fail_on_rank_1(rank: Rank, act: str, *args: Any) -> None:
    """Call the function `act` of this module on rank 1; the other ranks wait for it in a collective."""
    if rank.rank == 1:
        globals()[act](*args)
    all_reduce(rank)


def raise_value_error(text: str = "boom") -> None:
    raise ValueError(text)


def exit_with(code: int) -> None:
    os._exit(code)


def kill_itself(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def read_address_zero() -> None:
    import ctypes

    ctypes.string_at(0)


def loop_forever() -> None:
    while True:
        pass


def sleep_forever() -> None:
    time.sleep(1000)


def suspend_rank_1_while_others_work(rank: Rank) -> None:
    if rank.rank == 1:
        kill_itself("SIGSTOP")
    loop_forever()


def sleep_on_every_rank(rank: Rank) -> None:
    time.sleep(1000)


class DoesNotUnpickle(Exception):
    """Pickles and does not unpickle: its constructor takes two arguments and its `args` contain one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class ContainsALock(Exception):
    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class CarriesDetails(Exception):
    tpcheck_details: ClassVar = {"parameter": "weight", "index": (0, 1)}


def raise_what_does_not_unpickle() -> None:
    raise DoesNotUnpickle("this", "that")


def raise_what_does_not_pickle() -> None:
    raise ContainsALock


def raise_with_details() -> None:
    raise CarriesDetails("wrong")


def return_generator_on_rank_1(rank: Rank) -> Any:
    return (number for number in range(3)) if rank.rank == 1 else None


def print_much_and_fail(rank: Rank) -> None:
    sys.stdout.write(("x" * 99 + "\n") * 100_000 + "the end\n")
    raise ValueError


class RaisesWhenUnpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return _raise_when_unpickled, ("no heads",)


def _raise_when_unpickled(reason: str) -> Any:
    raise ValueError(reason)


def return_what_does_not_unpickle_on_rank_1(rank: Rank) -> Any:
    return RaisesWhenUnpickled() if rank.rank == 1 else None


def return_twice_on_rank_1(rank: Rank) -> None:
    if rank.rank == 1:
        os.fork()


def print_everywhere(rank: Rank) -> None:
    sys.stdout.write("python to stdout\n")
    sys.stderr.write("python to stderr\n")
    os.write(1, b"descriptor 1\n")
    subprocess.run(["/bin/sh", "-c", "echo child of the rank"], check=True)


def print_and_raise(rank: Rank) -> None:
    sys.stdout.write(f"rank {rank.rank} was here\n")
    if rank.rank == 1:
        raise_value_error()
    all_reduce(rank)


def load_data_with_workers(rank: Rank) -> int:
    """Start two persistent workers and leave them running."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.arange(8)), num_workers=2, persistent_workers=True)
    globals()["_kept"] = loader
    globals()["_iterator"] = iter(loader)
    return sum(int(batch[0]) for batch in loader)


def leave_children_behind(rank: Rank) -> list[int]:
    """Start a child, a child in a new session, a thread, and a shared memory segment with its tracker."""
    from multiprocessing import resource_tracker, shared_memory

    plain = subprocess.Popen(["sleep", "1000"])
    new_session = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    globals()["_segment"] = shared_memory.SharedMemory(create=True, size=4096)
    tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    return [os.getpid(), plain.pid, new_session.pid, tracker]


def leave_children_and_die(rank: Rank, pids_file: str) -> None:
    from pathlib import Path

    Path(f"{pids_file}.{rank.rank}").write_text(" ".join(map(str, leave_children_behind(rank))))
    os.kill(os.getpid(), signal.SIGKILL)


def draw(rank: Rank) -> tuple[float, float, float]:
    import random

    import numpy as np
    import torch

    return random.random(), float(np.random.rand()), float(torch.rand(()))


def environment_variable(rank: Rank, name: str) -> str | None:
    return os.environ.get(name)


def process_id(rank: Rank) -> int:
    return os.getpid()


def replace_default_group(rank: Rank) -> int:
    """Destroy the default group and initialise another from the environment, as code under test may do."""
    import torch

    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo")
    return all_reduce(rank)


def use_store_on_master_port(rank: Rank) -> bytes:
    """Create a store on MASTER_PORT, as launch scripts do."""
    import torch

    port = int(os.environ["MASTER_PORT"])
    is_server = rank.rank == 0
    if not is_server:
        torch.distributed.barrier()
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], port, None, is_server, wait_for_workers=False)
    if is_server:
        store.set("key", "value")
        torch.distributed.barrier()
    torch.distributed.barrier()
    value: bytes = store.get("key")
    torch.distributed.barrier()
    return value


def has_no_shared_memory_operator(rank: Rank) -> bool:
    module = importlib.import_module("deepspeed.comm.torch")  # the attribute deepspeed.comm.torch is torch itself
    return module.build_shm_op() is None


def train_with_ddp(rank: Rank) -> float:
    """Train with DistributedDataParallel; return the sum of a gradient that is averaged over the ranks."""
    import torch

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    for _ in range(12):  # DDP logs its run time at the tenth step
        model.zero_grad()
        model(torch.full((1, 2), float(rank.rank))).sum().backward()
    return float(model.module.weight.grad.sum())
