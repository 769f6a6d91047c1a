"""Imported by the forkserver alone: creates what takes every rank 20 ms to create."""

from tpcheck.pytest_plugin.run_on_rank import bare_config

bare_config()
