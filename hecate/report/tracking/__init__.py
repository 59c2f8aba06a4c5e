"""Experiment trackers that a run reports to, apart from the training."""
