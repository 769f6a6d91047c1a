"""What controller, template and ranks say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.core.topology import Topology

# controller -> template, over the template's own channel


@dataclass(frozen=True, slots=True)
class Open:
    """Start a world; its channel travels with this message.

    Attributes:
        also: Modules to import first, where that has not been done.
    """

    scratch: str
    port: int
    also: tuple[str, ...]


# template -> controller, over the template's own channel


@dataclass(frozen=True, slots=True)
class Ready:
    """The imports are done.

    Attributes:
        num_gpus: GPUs that torch can use, counted without initialising CUDA.
        broken: Packages that are installed but fail to import, with the error.
        scratch: Folder for the worlds' own ones. It goes with the template, so that a controller which dies between two
            steps leaves none of them.
    """

    num_gpus: int
    broken: dict[str, str]
    scratch: str


# controller -> template, over a world's channel


@dataclass(frozen=True, slots=True)
class Fork:
    """Start one rank. Control socket, stdout, stderr and the file for its stacks travel with this message."""

    rank: int
    topology: Topology
    device: str
    backend: str
    scratch: str
    environ: dict[str, str]
    sys_path: tuple[str, ...]
    argv: tuple[str, ...]
    cwd: str


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a signal to those of these ranks that still run."""

    ranks: tuple[int, ...]
    number: int


@dataclass(frozen=True, slots=True)
class End:
    """Kill every rank, wait for it, remove what it left behind; answered by `Ended`."""


# template -> controller, over a world's channel


@dataclass(frozen=True, slots=True)
class Forked:
    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A rank is gone; `status` is what waitpid said."""

    rank: int
    status: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing of this world is left."""


# controller -> rank


@dataclass(frozen=True, slots=True)
class Run:
    """Call the pickled `(fn, args, kwargs)`."""

    number: int
    call: bytes
    seed: int | None


@dataclass(frozen=True, slots=True)
class Leave:
    """Flush and say `Left`, then exit at the second `Leave`."""


# rank -> controller


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception as far as it can travel.

    Attributes:
        is_communication: The exception only says that another rank went away or did not come.
        exception: The pickled exception, None where it does not survive pickling.
        details: The pickled `tpcheck_details` of the exception.
    """

    error_type: str
    error: str
    traceback: str
    is_communication: bool
    exception: bytes | None
    details: bytes | None


@dataclass(frozen=True, slots=True)
class Result:
    """What the function returned; `kind` names its type for a process that cannot load it."""

    pickled: bytes
    kind: str


@dataclass(frozen=True, slots=True)
class Report:
    """The one answer of one rank to one run.

    Attributes:
        at: When the function ended, on the clock that all processes of the machine share.
        result: None after a failure.
        reusable: The rank still has the default group it started with.
    """

    number: int
    pid: int
    at: float
    result: Result | None
    failure: Failure | None
    reusable: bool


@dataclass(frozen=True, slots=True)
class Debugging:
    """A person is at this rank's prompt (or has left it): the deadline waits."""

    active: bool


@dataclass(frozen=True, slots=True)
class Left:
    """Everything is flushed; nothing is lost from here on."""
