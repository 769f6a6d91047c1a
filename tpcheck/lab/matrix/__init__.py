"""Many verifications as one table, compared with the register of known bugs."""
