"""Compare tensors of two checkpoints to the bit, and explain what happened to one that differs."""
