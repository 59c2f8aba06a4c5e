"""Kernel tests run in triton's interpreter with bfloat16 mended, or on a GPU under `TRITON_INTERPRET=0`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter_bf16 import bf16_right

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session", autouse=True)
def _bf16_right() -> Iterator[None]:
    if not INTERPRETED:
        yield
        return
    with bf16_right():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the CPU if they are interpreted, else the GPU."""
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and no GPU: nothing to run the kernels on")
    return torch.device("cuda")
