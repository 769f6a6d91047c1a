"""Turns the facts of a suspect into the cause that explains it: each is named only where its own numerical test holds.

`explain` has the table of tests by kind of tensor. A test is a function of a `Suspect`, the tensors and typed facts
that a check hands over: it returns an `Explanation` where the statement in its docstring holds, else None. `proof` has
how much of a difference may remain. A hypothesis predicts what each rank holds under a mistake; `first_confirmed` tests
such predictions.
"""
