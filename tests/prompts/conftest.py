"""Hypothesis without a deadline: the first call of a function loads what others do not."""

from hypothesis import settings

settings.register_profile("prompts", deadline=None)
settings.load_profile("prompts")
