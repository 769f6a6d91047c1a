"""`python -m tpcheck`, which torchrun can start: `torchrun --nproc-per-node 2 -m tpcheck verify llama --tp 2`."""

import sys


def main() -> None:
    """Run the `tpcheck` command; Ctrl-C ends it without a traceback, also while it is being imported."""
    try:
        _start_forkserver(sys.argv[1:])
        from tpcheck.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)  # as cli.terminal.INTERRUPTED, which may not be imported yet


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
