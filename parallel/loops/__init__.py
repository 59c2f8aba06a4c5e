"""Loops that numba compiles: how, where they are kept, and the arrays that they share."""
