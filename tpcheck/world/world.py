"""A world: the ranks of one topology on this machine, ready to run functions."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from tpcheck.core.errors import RankFailure, RankOutcome, UsageError
from tpcheck.core.topology import Topology
from tpcheck.world import launcher, messages
from tpcheck.world.channel import dumps
from tpcheck.world.environment import rank_environ, visible_gpus
from tpcheck.world.groups import choose_backend, device_of, reserve_port
from tpcheck.world.preload import DEFAULT
from tpcheck.world.processes import Fork, Processes, results

_MAX_SEED = 2**64 - 1  # what torch.manual_seed takes


def checked_timeout(timeout: Any) -> float | None:
    """Return seconds above 0, infinity included, or None: both are no limit.

    Raises:
        UsageError: It is neither.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not timeout > 0:
        raise UsageError("timeout", timeout, "seconds above 0, or None for no limit")
    return float(timeout)


def checked_seed(seed: Any) -> int | None:
    """Return a seed that Python, NumPy and torch all take, or None.

    Raises:
        UsageError: It is neither.
    """
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= _MAX_SEED):
        return seed
    raise UsageError("seed", seed, "an integer from 0 to 2**64 - 1, or None for another seed on every rank")


def checked_env(env: Any) -> dict[str, str]:
    """Return the variables.

    Raises:
        UsageError: They are no mapping, or the operating system would not take one of them.
    """
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise UsageError("env", env, "a mapping of variables to their values, both text")
    for name, value in env.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise UsageError("env", {name: value}, "names of variables: text without =")
        if not isinstance(value, str) or "\0" in value or not _is_encodable(name + value):
            raise UsageError("env", {name: value}, f"text as the value of {name}")
    return dict(env)


def checked_preload(preload: Any) -> tuple[str, ...] | None:
    """Return the names of modules to import, or None.

    Raises:
        UsageError: They are not a sequence of names, or one of the caller's own is not installed.
    """
    if preload is None:
        return None
    names = checked_modules("preload", preload)
    for name in names:
        if name not in DEFAULT and not _is_installed(name.partition(".")[0]):
            raise UsageError("preload", name, "modules that are installed")
    return names


def checked_modules(argument: str, names: Any) -> tuple[str, ...]:
    """Return names of modules, which need not be installed.

    Raises:
        UsageError: They are not a sequence of names.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(argument, names, 'a sequence of module names, such as ["torch"]')
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(argument, name, "names of modules")
    return tuple(names)


def refuse_broken(preload: Sequence[str] | None, broken: Mapping[str, str]) -> None:
    """Refuse a module of the caller's own choice that could not be imported; others are left for ranks that need them.

    Raises:
        UsageError: There is one.
    """
    for name in preload or ():
        if name in broken and name not in DEFAULT:
            raise UsageError("preload", name, f"modules that can be imported ({broken[name]})")


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that was made by hand, `__main__` for one
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
    """Return a world of this topology. Its ranks are forked warm from a process that has torch imported.

    Args:
        topology: Sizes of the parallel axes.
        timeout: Seconds that one run may take; None for no limit.
        device: `cpu`, `cuda`, or None for CUDA where every rank has a GPU of its own, else CPU.
        backend: `gloo`, `nccl`, or None for NCCL where every rank has a GPU of its own, else gloo.
        preload: Modules imported before ranks are forked, instead of torch, transformers, deepspeed and pytest.
        also: Modules imported beside those, where they are installed: what each rank of this world alone would import.
        seed: Seeds Python, NumPy and torch alike on every rank before each run. None seeds every rank differently:
            equal seeds hide a missing broadcast.
        capture: Keep what ranks print for `RankFailure` and `World.outcomes`; else it goes where this process prints.
        env: Environment variables for the ranks, over those of this process.

    Raises:
        UsageError: An argument is wrong, or asks for GPUs that are not there.

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
    if not isinstance(topology, Topology):
        raise UsageError("topology", topology, "a tpcheck.Topology")
    if device is not None and device not in DEVICES:
        raise UsageError("device", device, DEVICES)
    return World(
        topology,
        timeout=checked_timeout(timeout),
        device=device,
        backend=backend,
        preload=checked_preload(preload),
        also=checked_modules("also", also),
        seed=checked_seed(seed),
        capture=capture,
        env=checked_env(env),
    )


class World:
    """Made by `spawn`; use it in a `with` statement, from one thread at a time.

    Processes start at the first `run` and are kept for the next ones, with all that a function left in them. They are
    fresh again after a `RankFailure`, and after a function that replaced the default process group.

    Attributes:
        topology: Sizes of the parallel axes.
        timeout: Seconds that one run may take; may be changed between runs.
        device: `cpu` or `cuda`.
        backend: `gloo` or `nccl`.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeout: float | None,
        device: str | None,
        backend: str | None,
        preload: tuple[str, ...] | None,
        also: tuple[str, ...],
        seed: int | None,
        capture: bool,
        env: dict[str, str],
    ) -> None:
        self.topology = topology
        self._timeout = timeout
        self._template, self.device, num_gpus = _template_for(topology, device, preload)
        self.backend = choose_backend(backend, kind=self.device, num_gpus=num_gpus, num_ranks=topology.world_size)
        self._preload = preload
        self._also = also
        self._num_gpus = num_gpus
        self._seed = seed
        self._capture = capture
        self._env = env
        self._processes: Processes | None = None
        self._outcomes: tuple[RankOutcome, ...] = ()
        self._closed = False

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call `fn(rank, *args, **kwargs)` on every rank; return the results by rank.

        Function, arguments and results travel by cloudpickle, lambdas and functions of `__main__` included.

        Raises:
            RankFailure: A rank raised, died, or did not answer in time. All processes of the world have been ended.
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
            self._outcomes = self._processes.outcomes()
            return results(reports, self._outcomes)
        except BaseException as error:  # Ctrl-C included
            if isinstance(error, RankFailure):
                self._outcomes = error.outcomes
            self._end()
            raise

    @property
    def timeout(self) -> float | None:
        return self._timeout

    @timeout.setter
    def timeout(self, timeout: float | None) -> None:
        self._timeout = checked_timeout(timeout)

    @property
    def outcomes(self) -> tuple[RankOutcome, ...]:
        """How each rank ended the last run, and what it printed; empty before the first."""
        return self._outcomes

    def close(self) -> None:
        """End every rank, and wait until nothing of this world is left. May be called twice.

        Raises:
            RankFailure: A rank answered the last run a second time.
        """
        self._closed = True
        if self._processes is None:
            return
        try:
            if self._processes.reusable:
                self._processes.leave()
            self._processes.refuse_second_reports()
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

    def _start(self) -> Processes:
        self._template = launcher.template(self.device, self._preload)  # the same one, unless that has ended
        refuse_broken(self._preload, self._template.ready().broken)
        port = reserve_port()
        scratch = self._template.new_scratch()
        try:
            forks = tuple(self._fork(rank, scratch, port.getsockname()[1]) for rank in range(self.topology.world_size))
            return Processes(self._template, forks, scratch=scratch, port=port, also=self._also)
        except BaseException:  # Ctrl-C included; with the port goes the claim on it, with the socket the ranks
            port.close()
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _fork(self, rank: int, scratch: str, port: int) -> Fork:
        environ = rank_environ(
            os.environ,
            topology=self.topology,
            rank=rank,
            port=port,
            device=self.device,
            scratch=scratch,
            extra=self._env,
        )
        order = messages.Fork(
            rank=rank,
            topology=self.topology,
            device=device_of(rank, kind=self.device, num_gpus=self._num_gpus),
            backend=self.backend,
            scratch=scratch,
            environ=environ,
            sys_path=tuple(sys.path),
            argv=tuple(sys.argv),
            cwd=str(Path.cwd()),
        )
        return Fork(order, self._capture)


def _template_for(
    topology: Topology, device: str | None, preload: Sequence[str] | None
) -> tuple[launcher.Template, str, int]:
    """Return the template, the kind of device, and how many GPUs ranks may use."""
    enough = visible_gpus(os.environ) >= topology.world_size
    if device == "cuda" or (device is None and enough):
        template = launcher.template("cuda", preload)
        num_gpus = template.ready().num_gpus
        if num_gpus >= (topology.world_size if device is None else 1):
            return template, "cuda", num_gpus
        if device == "cuda":
            raise UsageError("device", device, "cpu: torch finds no GPU here")
    return launcher.template("cpu", preload), "cpu", 0


def _pickled_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        return dumps((fn, args, kwargs))
    except Exception as error:
        accepted = f"a function whose arguments and closure pickle ({type(error).__name__}: {error})"
        raise UsageError("fn", fn, accepted) from error
