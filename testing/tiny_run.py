"""The tiny run of the drills, by the name that tests and benchmarks have for it."""

from hecate.apps.check.drill.tiny_run import STEPS, make_workshop, save_random_llama, write_samples

__all__ = ["STEPS", "make_workshop", "save_random_llama", "write_samples"]
