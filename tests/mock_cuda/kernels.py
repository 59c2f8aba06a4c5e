"""Kernels of GPUs on the mock device: Triton's interpreter works on its memory itself, attention is in plain torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from hecate.kernels.common.kernel_launch import Launch
from hecate.model import attention_kernels
from hecate.model.attention_kernels import package_flash
from tests.mock_cuda.install import device
from tests.plain_attention import plain_flash, plain_flex

LAUNCHES: Counter[str] = Counter()
"""kernel -> how often it was launched in this process"""


def interpret_in_place() -> None:
    """Have launches of kernels run in the interpreter on aliases of their arguments. A CPU tensor among them is refused. Kernels of
    attention, which torch and flash-attn would bring, become the formulas of `tests.plain_attention`.
    """
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
    attention_kernels.flex_kernel = lambda length: plain_flex
    attention_kernels.flash_kernel = lambda: package_flash(plain_flash)  # type: ignore[assignment]
