"""Pair sources: where low-rank pairs come from, and what of them is trained."""
