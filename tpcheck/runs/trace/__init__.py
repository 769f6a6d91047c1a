"""What is kept of a run: records and tensors of its steps, and the files they lie in."""
