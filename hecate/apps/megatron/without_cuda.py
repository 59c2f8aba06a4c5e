"""What Megatron's own MoELayer and its sharded layers take for granted of CUDA, answered on machines without it.

They ask for streams and for the current device, and the token dispatcher moves splits to numpy only if they come from a GPU. The modules
that ask see a `torch` whose `cuda` answers; torch itself stays as it is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_MODULES = (
    *("utils", "tensor_parallel.mappings", "tensor_parallel.layers"),
    *("transformer.moe.token_dispatcher", "transformer.moe.router", "transformer.moe.experts"),
)
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"


def answer_for_cuda() -> None:
    """Make them run on the CPU. Does nothing where there is a GPU, or a second time."""
    if torch.cuda.is_available():
        return
    for name in _MODULES:
        module: Any = import_module(f"megatron.core.{name}")
        module.torch = _TORCH
    dispatcher: Any = import_module(_DISPATCHER)
    dispatcher.maybe_move_tensor_to_cpu = _to_cpu


class _Stream:
    """The one stream of a CPU."""

    def wait_stream(self, _: Any) -> None: ...
    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


class _Cuda:
    _stream = _Stream()

    def Stream(self) -> _Stream:
        return self._stream

    def current_stream(self) -> _Stream:
        return self._stream

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def stream(self, _: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(ModuleType):
    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_TORCH = _Torch("torch")


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.cpu().numpy() if as_numpy and torch.is_tensor(tensor) else tensor
