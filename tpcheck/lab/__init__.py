"""What proves the tool: injected faults, searches, the matrix of families, and the register of known upstream bugs."""
