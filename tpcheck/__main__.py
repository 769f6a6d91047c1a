"""`python -m tpcheck`, which torchrun can start: `torchrun --nproc-per-node 2 -m tpcheck verify llama --tp 2`."""

from tpcheck.cli import main

if __name__ == "__main__":
    main()
