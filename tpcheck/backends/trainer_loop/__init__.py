"""transformers' Trainer as what drives the steps of a candidate, and what stands in for a GPU where there is none."""
