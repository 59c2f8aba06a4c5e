"""Mixtures of experts: families, router, losses, and the engine that runs them fully sharded."""
