"""The messages that controller, forkserver and ranks send each other.

from            to            over its channel of    message
controller      forkserver    the forkserver         OpenWorld
forkserver      controller    the forkserver         ForkserverReady
controller      forkserver    a world                ForkRank, SignalRanks, EndWorld
forkserver      controller    a world                RankForked, RankExited, WorldEnded
controller      rank          a rank                 RunFunction, Exit
rank            controller    a rank                 RankReport, Debugging, ReadyToExit
"""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.core.topology import Topology
from tpcheck.world.groups import StoreAddress


@dataclass(frozen=True, slots=True)
class OpenWorld:
    """Start a world; the descriptor of its channel travels with this message.

    Attributes:
        scratch: Folder of the world.
        port: MASTER_PORT of its ranks.
        extra_preload: Modules to import before ranks are forked.
    """

    scratch: str
    port: int
    extra_preload: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ForkserverReady:
    """The imports are done.

    Attributes:
        num_gpus: GPUs that torch can use, counted without initialising CUDA.
        import_errors: Modules that are installed but fail to import, with the error.
    """

    num_gpus: int
    import_errors: dict[str, str]


@dataclass(frozen=True, slots=True)
class ForkRank:
    """Fork one rank. Descriptors of its channel, stdout, stderr and stack file travel with this message.

    Attributes:
        store: Where the ranks meet, None for a file in the folder of the world.
    """

    rank: int
    topology: Topology
    device: str
    backend: str
    scratch: str
    environ: dict[str, str]
    sys_path: tuple[str, ...]
    argv: tuple[str, ...]
    cwd: str
    store: StoreAddress | None = None


@dataclass(frozen=True, slots=True)
class SignalRanks:
    """Send a signal to each of these ranks that still runs."""

    ranks: tuple[int, ...]
    number: int


@dataclass(frozen=True, slots=True)
class EndWorld:
    """Kill every rank, wait for it, remove what it left behind; answered by `WorldEnded`."""


@dataclass(frozen=True, slots=True)
class RankForked:
    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class RankExited:
    """A rank has exited; `status` is what waitpid returned."""

    rank: int
    status: int


@dataclass(frozen=True, slots=True)
class WorldEnded:
    """No process or file of this world is left."""


@dataclass(frozen=True, slots=True)
class RunFunction:
    """Call the pickled `(fn, args, kwargs)`."""

    call: bytes
    seed: int | None


@dataclass(frozen=True, slots=True)
class Exit:
    """Flush and answer `ReadyToExit`; exit at the second `Exit`, when every rank is ready."""


@dataclass(frozen=True, slots=True)
class SerializedException:
    """An exception in a form that every process can load.

    Attributes:
        is_communication: The exception only says that another rank failed or is missing.
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
class SerializedResult:
    """The pickled return value, and the name of its type for a process that cannot load it."""

    pickled: bytes
    type_name: str


@dataclass(frozen=True, slots=True)
class RankReport:
    """The answer of one rank to one run.

    Attributes:
        at: When the function ended, on the monotonic clock that all processes of the machine share.
        outcome: What the function returned or raised.
        reusable: The rank still has the default group that it started with.
    """

    pid: int
    at: float
    outcome: SerializedResult | SerializedException
    reusable: bool

    @property
    def exception(self) -> SerializedException | None:
        return self.outcome if isinstance(self.outcome, SerializedException) else None


@dataclass(frozen=True, slots=True)
class Debugging:
    """A debugger prompt has opened (or closed) on this rank: the deadline is suspended meanwhile."""

    active: bool


@dataclass(frozen=True, slots=True)
class ReadyToExit:
    """All output is flushed."""
