"""Checks without running a model: versions, leftovers of killed runs, problems of a DeepSpeed configuration."""
