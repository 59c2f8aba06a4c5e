"""Differential privacy of samples: the section `privacy` of a configuration, and what it does in trainings, federated or not."""
