"""Known bugs, injected on purpose into the system under test to prove that a check can fail. Mostly data."""
