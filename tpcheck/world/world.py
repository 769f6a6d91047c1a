"""A world: the ranks of one topology on this machine, ready to run functions."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol

from tpcheck.core.errors import RankFailure, RankOutcome, UsageError
from tpcheck.core.memory import GIB, free_memory
from tpcheck.core.topology import Topology
from tpcheck.world.channel import dumps
from tpcheck.world.environment import visible_gpus
from tpcheck.world.forkserver_client import DEFAULT_PRELOAD, ForkserverClient, get_forkserver
from tpcheck.world.groups import choose_backend, reserve_port
from tpcheck.world.processes import LocalHost, WorldProcesses, load_results
from tpcheck.world.requests import RankOrigin, WorldPlan, fork_request

_MAX_SEED = 2**64 - 1  # the largest that torch.manual_seed takes


def require_seconds(timeout: Any) -> float | None:
    """Return a timeout in seconds; infinity and None mean no limit.

    Raises:
        UsageError: It is no such number.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not timeout > 0:
        raise UsageError("timeout", timeout, "seconds above 0, or None for no limit")
    return float(timeout)


def _checked_seed(seed: Any) -> int | None:
    """Return the seed, which Python, NumPy and torch accept, or None."""
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= _MAX_SEED):
        return seed
    raise UsageError("seed", seed, "an integer from 0 to 2**64 - 1, or None for a different seed on every rank")


def _checked_env(env: Any) -> dict[str, str]:
    """Return the environment variables, which the operating system accepts."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise UsageError("env", env, "a mapping of names to values, both strings")
    for name, value in env.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise UsageError("env", {name: value}, "names of variables: strings without =")
        if not isinstance(value, str) or "\0" in value or not _is_encodable(name + value):
            raise UsageError("env", {name: value}, f"a string as the value of {name}")
    return dict(env)


def _checked_preload(preload: Any) -> tuple[str, ...] | None:
    """Return the names of modules, which are installed or among the defaults, or None."""
    if preload is None:
        return None
    names = _checked_module_names("preload", preload)
    for name in names:
        if name not in DEFAULT_PRELOAD and not _is_installed(name.partition(".")[0]):
            raise UsageError("preload", name, "modules that are installed")
    return names


def _checked_module_names(argument: str, names: Any) -> tuple[str, ...]:
    """Return the names of modules, which need not be installed."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(argument, names, 'a sequence of module names, such as ["torch"]')
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(argument, name, "names of modules")
    return tuple(names)


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module without a spec, such as `__main__`
        return True


DEVICES = ("cpu", "cuda")


def spawn(
    topology: Topology,
    *,
    timeout: float | None = 60,
    device: str | None = None,
    backend: str | None = None,
    preload: Sequence[str] | None = None,
    also: Sequence[str] = (),
    seed: int | None = None,
    capture: bool = True,
    env: Mapping[str, str] | None = None,
) -> World:
    """Return a world of this topology. Its ranks are forked from a process that has torch imported.

    Args:
        topology: Sizes of the parallel axes.
        timeout: Seconds that one run may take; None for no limit.
        device: `cpu`, `cuda`, or None for CUDA where every rank has its own GPU, else CPU.
        backend: `gloo`, `nccl`, or None for NCCL where every rank has its own GPU, else gloo.
        preload: Modules imported before ranks are forked, instead of torch, transformers, deepspeed and, in tests,
            pytest.
        also: Modules imported after those, where they are installed, when this world starts.
        seed: Seeds Python, NumPy and torch equally on every rank before each run. None seeds every rank differently:
            equal seeds hide a missing broadcast.
        capture: Keep the output of ranks for `RankFailure` and `World.outcomes`; else it goes to this process's output.
        env: Environment variables for the ranks, which override those of this process.

    Raises:
        UsageError: An argument is wrong, or requires GPUs that do not exist.

    Example:
        >>> def total(rank):
        ...     import torch
        ...     number = torch.tensor(rank.rank + 1)
        ...     torch.distributed.all_reduce(number, group=rank.group("tp"))
        ...     return int(number)
        >>> with spawn(Topology(tp=2)) as world:
        ...     world.run(total)
        (3, 3)
    """
    return open_world(
        THIS_MACHINE,
        topology,
        timeout=timeout,
        device=device,
        backend=backend,
        preload=preload,
        also=also,
        seed=seed,
        capture=capture,
        env=env,
    )


def open_world(
    machines: Machines,
    topology: Topology,
    *,
    timeout: float | None,
    device: str | None,
    backend: str | None,
    preload: Sequence[str] | None,
    also: Sequence[str] = (),
    seed: int | None = None,
    capture: bool,
    env: Mapping[str, str] | None = None,
) -> World:
    """Return a world on these machines, with the arguments of `spawn`."""
    if not isinstance(topology, Topology):
        raise UsageError("topology", topology, "a tpcheck.Topology")
    if device is not None and device not in DEVICES:
        raise UsageError("device", device, DEVICES)
    return World(
        machines,
        topology,
        timeout=require_seconds(timeout),
        device=device,
        backend=backend,
        preload=_checked_preload(preload),
        extra_preload=_checked_module_names("also", also),
        seed=_checked_seed(seed),
        capture=capture,
        env=_checked_env(env),
    )


class Machines(Protocol):
    """Where the ranks of a world run: on this machine, or where a launcher has started processes."""

    def choose_device(self, topology: Topology, device: str | None, preload: Sequence[str] | None) -> tuple[str, int]:
        """Return the kind of device, and the number of GPUs that ranks may use.

        Raises:
            UsageError: The device requires GPUs that do not exist, or the topology other machines.
        """

    def start(self, plan: WorldPlan) -> WorldProcesses:
        """Fork every rank."""


class _ThisMachine:
    def choose_device(self, topology: Topology, device: str | None, preload: Sequence[str] | None) -> tuple[str, int]:
        _require_memory(topology)
        has_gpu_per_rank = visible_gpus(os.environ) >= topology.world_size
        if device == "cuda" or (device is None and has_gpu_per_rank):
            num_gpus = get_forkserver("cuda", preload).wait_until_ready().num_gpus
            if num_gpus >= (topology.world_size if device is None else 1):
                return "cuda", num_gpus
            if device == "cuda":
                raise UsageError("device", device, "cpu: torch finds no GPU here")
        get_forkserver("cpu", preload)  # it is ready some seconds later
        return "cpu", 0

    def start(self, plan: WorldPlan) -> WorldProcesses:
        forkserver = ready_forkserver(plan)  # the same one, unless it has ended
        num_gpus = forkserver.wait_until_ready().num_gpus
        port = reserve_port()
        scratch = forkserver.new_scratch()
        try:
            port_number = port.getsockname()[1]
            host = LocalHost(
                forkserver, scratch=scratch, port=port_number, extra_preload=plan.extra_preload, capture=plan.capture
            )
            for rank in range(plan.topology.world_size):
                origin = RankOrigin.here(rank, local_rank=rank, num_gpus=num_gpus)
                host.fork(fork_request(plan, origin, scratch=scratch, port=port_number))
            return WorldProcesses([host], port=port)
        except BaseException:  # Ctrl-C included; the forkserver ends the ranks when the channel is garbage collected
            port.close()
            shutil.rmtree(scratch, ignore_errors=True)
            raise


THIS_MACHINE: Machines = _ThisMachine()

_IDLE_RANK = 6 * 1024**2  # bytes of its own, after one all-reduce; what torch and transformers take is shared


def _require_memory(topology: Topology) -> None:
    """Raise UsageError where this machine cannot hold so many processes: forked, they take all others' memory."""
    needed, free = topology.world_size * _IDLE_RANK / GIB, free_memory() / GIB
    if needed > free:
        raise UsageError(
            "topology",
            topology,
            f"fewer ranks: {topology.world_size:,} processes on one machine need more than {needed:,.1f} GiB, and "
            f"{free:,.1f} GiB are free",
        )


def start_early() -> None:
    """Start the forkserver of worlds to come, which imports for seconds, unless they may run on GPUs."""
    if not visible_gpus(os.environ):
        get_forkserver("cpu")


def ready_forkserver(plan: WorldPlan) -> ForkserverClient:
    """Return a forkserver of this process that has imported what the plan says.

    Raises:
        UsageError: A module that the caller named fails to import.
    """
    forkserver = get_forkserver(plan.device, plan.preload)
    import_errors = forkserver.wait_until_ready().import_errors
    for name in plan.preload or ():
        if name in import_errors and name not in DEFAULT_PRELOAD:  # ranks that need a default one fail themselves
            raise UsageError("preload", name, f"modules that can be imported ({import_errors[name]})")
    return forkserver


class World:
    """The ranks of one topology, created by `spawn`. Use it in a `with` statement, from one thread at a time.

    Processes start at the first `run` and serve the next runs, with all state that a function leaves in them. New
    processes start after a `RankFailure`, and after a function that replaced the default process group.

    Attributes:
        topology: Sizes of the parallel axes.
        timeout: Seconds that one run may take; can be set between runs.
        device: `cpu` or `cuda`.
        backend: `gloo` or `nccl`.
        outcomes: How each rank ended the last run, and what it printed; empty before the first run.
    """

    def __init__(
        self,
        machines: Machines,
        topology: Topology,
        *,
        timeout: float | None,
        device: str | None,
        backend: str | None,
        preload: tuple[str, ...] | None,
        extra_preload: tuple[str, ...],
        seed: int | None,
        capture: bool,
        env: dict[str, str],
    ) -> None:
        self.topology = topology
        self._timeout = timeout
        self._machines = machines
        self.device, num_gpus = machines.choose_device(topology, device, preload)
        self.backend = choose_backend(backend, kind=self.device, num_gpus=num_gpus, num_ranks=topology.world_size)
        self._preload = preload
        self._extra_preload = extra_preload
        self._seed = seed
        self._capture = capture
        self._env = env
        self._processes: WorldProcesses | None = None
        self.outcomes: tuple[RankOutcome, ...] = ()
        self._closed = False

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call `fn(rank, *args, **kwargs)` on every rank; return the results by rank.

        Function, arguments and results are sent by cloudpickle, which takes lambdas and functions of `__main__`.

        Raises:
            RankFailure: A rank raised, died, or did not return in time. All processes of the world have exited.
            UsageError: The function or an argument does not pickle, or the world is closed.
        """
        if self._closed:
            raise UsageError("world", self, "a world that is open")
        call = _pickled_call(fn, args, kwargs)
        if self._processes is not None and not self._processes.reusable:
            self._end()
        try:
            if self._processes is None:
                self._processes = self._start()
            reports = self._processes.run(call, seed=self._seed, timeout=self.timeout)
            self.outcomes = self._processes.outcomes()
            return load_results(reports, self.outcomes)
        except BaseException as error:  # Ctrl-C included
            if isinstance(error, RankFailure):
                self.outcomes = error.outcomes
            self._end()
            raise

    @property
    def timeout(self) -> float | None:
        """Seconds for each call of `run`; None for no limit."""
        return self._timeout

    @timeout.setter
    def timeout(self, timeout: float | None) -> None:
        self._timeout = require_seconds(timeout)

    def close(self) -> None:
        """End every rank, and wait until no process or file of this world is left. A second call does nothing.

        Raises:
            RankFailure: A rank has reported the last run twice.
        """
        self._closed = True
        if self._processes is None:
            return
        try:
            if self._processes.reusable:
                self._processes.exit()
            self._processes.raise_if_reported_twice()
        finally:
            self._end()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._end()
        self.close()

    def __repr__(self) -> str:
        return f"<World of {self.topology} on {self.device}, {self.backend}>"

    def __del__(self) -> None:
        if (processes := getattr(self, "_processes", None)) is not None:
            processes.abandon()

    def _end(self) -> None:
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.end()

    def _start(self) -> WorldProcesses:
        plan = WorldPlan(
            topology=self.topology,
            device=self.device,
            backend=self.backend,
            preload=self._preload,
            extra_preload=(*self._extra_preload, *self._own_preload()),
            capture=self._capture,
            env=self._env,
        )
        return self._machines.start(plan)

    def _own_preload(self) -> tuple[str, ...]:
        """Return the modules of this package that this process has imported: its ranks need the same, commands apart.

        Those of a verification take a rank 0.14 s, a fifth of its time. Backends' modules import libraries that might
        initialise CUDA, which would not survive a fork.
        """
        if self._preload is not None or self.device != "cpu":
            return ()
        package = __name__.partition(".")[0]
        of_commands = (f"{package}.cli", f"{package}.__main__")
        return tuple(
            name for name in list(sys.modules) if name.startswith(f"{package}.") and not name.startswith(of_commands)
        )


def _pickled_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        return dumps((fn, args, kwargs))
    except Exception as error:
        expected = f"a function whose arguments and closure pickle ({type(error).__name__}: {error})"
        raise UsageError("fn", fn, expected) from error
