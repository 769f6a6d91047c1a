"""Documented import path of the hooks for training loops; they live in `tpcheck.batches`. Loads no torch."""
