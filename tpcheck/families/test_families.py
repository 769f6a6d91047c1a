"""The matrix as tests: `pytest --pyargs tpcheck.families -k "llama or qwen3"`."""

from importlib import import_module

# A test stands above what it tests, wherever its file lies: the layers of tpcheck hold for what is imported from it.
test_families = import_module("tpcheck.testing").family_tests()
