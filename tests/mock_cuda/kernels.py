"""Triton's interpreter works on the mock device's memory itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from hecate.kernels.common.kernel_launch import Launch
from tests.mock_cuda.install import device

LAUNCHES: Counter[str] = Counter()
"""kernel -> how often it was launched in this process"""


def interpret_in_place() -> None:
    """Have launches of kernels run in the interpreter on aliases of their arguments. A CPU tensor among them is refused."""
    plain = Launch.run

    def run(self: Launch) -> None:
        LAUNCHES[self.kernel.__name__] += 1

        def on_host(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            assert value.is_cuda, f"{self.kernel.__name__}: a CPU tensor is given to a GPU kernel"
            return device.as_cpu(value.detach())

        plain(replace(self, args={name: on_host(value) for name, value in self.args.items()}))

    Launch.run = run  # type: ignore[method-assign]
