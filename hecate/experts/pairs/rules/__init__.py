"""Gradient rules of pairs, one a file, by its name. Each has a `RULE`, from pairs and their `LoraShape` to pairs (docs/extend)."""
