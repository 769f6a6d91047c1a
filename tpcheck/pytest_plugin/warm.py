"""Imported by the template alone: makes what every rank would otherwise make for itself, in 20 ms each."""

from tpcheck.pytest_plugin.rank_body import bare_config

bare_config()
