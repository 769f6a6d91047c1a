"""`tpcheck.watch` inside the loops of others: transformers' Trainer, Lightning, any model. Loads no torch."""
