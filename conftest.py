"""The tests of the pytest plugin run pytest; those of properties take the time that a busy machine needs."""

from hypothesis import settings

pytest_plugins = ["pytester"]

settings.register_profile("tpcheck", deadline=None)
settings.load_profile("tpcheck")
