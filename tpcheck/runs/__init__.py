"""A training run: recorded in its loop, and compared with another."""
