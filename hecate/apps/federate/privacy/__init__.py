"""Differential privacy of samples: the section `privacy` of a configuration, and what it does in trainings, federated or not."""

import hecate.config  # noqa: F401 - before the section, of which it makes a part of itself
