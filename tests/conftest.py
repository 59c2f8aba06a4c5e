"""Hypothesis looks at the same examples in every run, without deadlines: the machines are shared, and a red run must be repeatable.

Triton kernels are interpreted, on CPU tensors, unless `TRITON_INTERPRET=0` is set (on a machine with a GPU, to check them there). The
mode is fixed where `@triton.jit` first runs, and modules of several test folders share a process, so it is chosen here, before any.
A test that compiles kernels does so in a process of its own, without the variable.

Tokenized data are kept in a folder of the tests' own.
"""

import os
import tempfile

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")

_cache = tempfile.TemporaryDirectory(prefix="hecate-tokens-")  # removed when this process ends
os.environ.setdefault("HECATE_CACHE", _cache.name)

os.environ.setdefault("TRITON_INTERPRET", "1")
