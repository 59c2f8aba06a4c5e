from __future__ import annotations

import pytest

from tests.mock_cuda.build import build, why_not


@pytest.fixture(scope="session", autouse=True)
def _mock_device() -> None:
    """The compiled mock device. Without it, nothing of this folder runs on anything like a GPU."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no mock CUDA device: {reason}")
    build()
