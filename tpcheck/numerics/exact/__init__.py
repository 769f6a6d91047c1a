"""Comparing stored tensors to the bit, and what happened to one that differs."""
