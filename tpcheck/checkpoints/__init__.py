"""`tpcheck.verify_checkpoint`: is the saved model the reference, to the bit? If not, what happened to each tensor?"""
