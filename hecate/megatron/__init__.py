"""Models built by Megatron (megatron-core) around our experts: a front end to the same engine and trainer as transformers' models.

Importing megatron takes seconds, so only `front_end` is imported from outside, and only where a configuration asks for it.
"""
