"""Readers of checkpoints, one file for each format; found through entry points."""
