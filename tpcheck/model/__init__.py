"""`tpcheck.verify`: one model, run end to end: built, sharded, trained beside its reference, saved, and compared."""
