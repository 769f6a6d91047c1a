"""Many verifications: run side by side, held against the register, shown as one table."""
