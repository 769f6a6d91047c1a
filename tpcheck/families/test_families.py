"""The matrix as tests: `pytest --pyargs tpcheck.families -k "llama or qwen3"`."""

from importlib import import_module

# Imported by name, since families is a lower layer than testing.
test_families = import_module("tpcheck.testing").family_tests()
