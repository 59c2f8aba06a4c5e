"""The optimizer over owned and replicated parameters, and the learning-rate schedule."""
