"""Simulated training steps under any policy, without a GPU."""
