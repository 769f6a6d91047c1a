"""`python -m tpcheck`, which torchrun can start: `torchrun --nproc-per-node 2 -m tpcheck verify llama --tp 2`."""

import sys


def main() -> None:
    """Run the `tpcheck` command; Ctrl-C ends it without a traceback, also while it is being imported."""
    try:
        from tpcheck.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)  # as cli.terminal.INTERRUPTED, which may not be imported yet


if __name__ == "__main__":
    main()
