"""By what two computations are held against each other: recording, replays, tolerance, checks, hypotheses."""
