"""Placement policies of other systems, as their authors describe them."""
