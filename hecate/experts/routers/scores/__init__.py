"""What routers make of logits, one way a file, by its name. Each has a `SCORE`, a function of logits [T, E] (docs/extend)."""
