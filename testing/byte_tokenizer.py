"""The tokenizer of `hecate.apps.check.drill.tiny_run`, by the name that tests and benchmarks have for it."""

from hecate.apps.check.drill.tiny_run import TEMPLATE, build_byte_tokenizer

__all__ = ["TEMPLATE", "build_byte_tokenizer"]
