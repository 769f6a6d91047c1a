"""`record`: the steps of a training loop, written as they happen."""
