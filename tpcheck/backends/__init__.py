"""One package or file per backend; reached through entry points alone."""
