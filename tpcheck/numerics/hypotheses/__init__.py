"""Turns the facts of a suspect into the cause that explains it: each is named only where its own numerical test holds.

`explain` has the table of tests by kind of tensor. A test is a function of a `Suspect`: from the tensors and typed
facts that a check has handed over it returns an `Explanation` or None. `proof` says how much of a difference may
remain. A hypothesis predicts what each rank holds under a mistake; `predicted` is the test of such predictions.
"""
