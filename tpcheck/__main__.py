"""`python -m tpcheck`, which torchrun can start: `torchrun --nproc-per-node 2 -m tpcheck verify llama --tp 2`."""

import signal
import sys
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM. Where Python sees a KeyboardInterrupt itself leave an `exec`, it later ends as by SIGINT."""


def main() -> None:
    """Run the `tpcheck` command; Ctrl-C and SIGTERM end it without a traceback, also while it is being imported."""
    terminated = []

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
        terminated.append(number)
        raise Terminated  # ends the ranks and removes temporary files

    try:
        from tpcheck.world.attach import is_launched

        # A launcher's rank may be in a collective, where no handler runs: it ends at once.
        if not is_launched() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)
        _start_forkserver(sys.argv[1:])
        from tpcheck.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)  # as cli.terminal.INTERRUPTED, which may not be imported yet
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is left to end does so by itself
        if terminated:
            sys.exit(128 + signal.SIGTERM)


def _start_forkserver(arguments: list[str]) -> None:
    """For `verify`, start the process that ranks are forked from: it imports while this one reads the command line."""
    if arguments[:1] != ["verify"] or not arguments[1:] or {"-h", "--help"} & {*arguments}:
        return
    from tpcheck.world.attach import is_launched
    from tpcheck.world.world import start_early

    if not is_launched():
        start_early()


if __name__ == "__main__":
    main()
