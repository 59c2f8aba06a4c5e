"""Training: one step, the optimizer, the loop, evaluation, what a person sees."""
