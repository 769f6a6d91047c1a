"""Known bugs, injected on purpose in what is under test, to prove that a check can fail. Mostly data."""
