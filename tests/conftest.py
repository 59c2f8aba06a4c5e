"""Hypothesis looks at the same examples in every run, without deadlines: the machines are shared, and a red run must be repeatable.

Triton kernels are interpreted, on CPU tensors, unless `TRITON_INTERPRET=0` is set (on a machine with a GPU, to check them there). The
mode is fixed where `@triton.jit` first runs, and modules of several test folders share a process, so it is chosen here, before any.
A test that compiles kernels does so in a process of its own, without the variable.

Tokenized data are kept in a folder of the tests' own. What hecate says is shown as its command shows it, and may be read by `caplog`, too.

Files that take a minute or more come first, so that at the end several workers have short ones to share.
"""

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")

_cache = tempfile.TemporaryDirectory(prefix="hecate-tokens-")  # removed when this process ends
os.environ.setdefault("HECATE_CACHE", _cache.name)

os.environ.setdefault("TRITON_INTERPRET", "1")

LONGEST = (
    *(
        "tests/docs/test_walk.py",
        "tests/mock_cuda/",
        "tests/hecate/train/test_run.py",
        "tests/hecate/test_equivalence.py",
        "tests/launch/test_survival.py",
    ),
    *("tests/hecate/train/test_moe_lora_run.py", "tests/hecate/train/test_full_run.py", "tests/hecate/elastic/test_rebuild.py"),
    *("tests/hecate/train/test_resume_elsewhere.py", "tests/hecate/apps/megatron/", "tests/hecate/train/", "tests/hecate/test_"),
)


@pytest.fixture(autouse=True)
def _messages() -> Iterator[None]:
    from hecate.io.terminal import show_messages

    logger = logging.getLogger("hecate")
    before = logger.handlers[:], logger.level, logger.propagate
    show_messages()
    logger.propagate = True
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def pytest_configure() -> None:
    from testing.interpreter import leave_out_what_is_thrown_away  # imports triton, which reads the variable above

    leave_out_what_is_thrown_away()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((place for place, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST)))
