"""Pair sources, one a file, by its name. Each has a `SOURCE`, and imports torch where it makes tensors and not before (docs/extend)."""
