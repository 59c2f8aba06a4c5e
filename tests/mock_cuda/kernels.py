"""Kernels of GPUs on the mock device: Triton's interpreter works on its memory itself, attention is in plain torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hecate.kernels.common.kernel_launch import Launch
from hecate.model.layers import attention_kernels
from hecate.model.layers.attention_kernels import package_flash
from testing.interpreter import leave_out_what_is_thrown_away
from tests.kernels.interpreter_bf16 import bf16_right
from tests.mock_cuda.install import device
from tests.plain_attention import plain_flash, plain_flex

_BF16_RIGHT = bf16_right()
LAUNCHES: Counter[str] = Counter()
"""kernel -> how often it was launched in this process"""


def interpret_in_place() -> None:
    """Have launches of kernels run in the interpreter, bfloat16 mended, on aliases of their arguments. A CPU tensor among them is refused.

    Kernels of attention, which torch and flash-attn would bring, become the formulas of `tests.plain_attention`.
    """
    _BF16_RIGHT.__enter__()  # for as long as the process lasts
    leave_out_what_is_thrown_away()
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
    attention_kernels.flex_kernel = _flex_kernel
    attention_kernels.flash_kernel = lambda: package_flash(_counted("flash_attention", plain_flash))  # type: ignore[assignment]


def _flex_kernel(length: int) -> Callable[..., torch.Tensor]:
    looked_at = length <= 4  # rows with which `LanguageModelHead` looks at a model
    assert looked_at or length % attention_kernels.FLEX_BLOCK == 0, f"rows of {length} positions: a kernel is compiled for each width"
    return _counted("flex_attention", plain_flex)


def _counted(name: str, kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*given: Any, **named: Any) -> torch.Tensor:
        LAUNCHES[name] += 1
        return kernel(*given, **named)

    return run
