"""Hypothesis looks at the same examples in every run, without deadlines: the machines are shared, and a red run must be repeatable."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")
