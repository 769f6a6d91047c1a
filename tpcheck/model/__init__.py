"""`tpcheck.verify`: a model is built, sharded, trained beside its reference, saved, and compared."""
