"""How a model's layers compute attention in training: `model.attention`, where each way can run, and how transformers comes to use it.

A way of ours is a function that transformers calls by name, in place of its own. transformers then makes no mask, and asks no GPU whether
rows are packed: what the function needs to know of the rows comes with the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from hecate.errors import UserError
from hecate.model.layers import attention_kernels as kernels
from hecate.model.layers.attention_kernels import AttentionRows, Scores

Way = Literal["sdpa", "flex", "flash"]

Kernel = Callable[[Tensor, Tensor, Tensor, AttentionRows, Scores], Tensor]
_KERNELS: dict[Way, Kernel] = {"sdpa": kernels.sdpa, "flex": kernels.flex, "flash": kernels.flash}
_PREFIX = "hecate_"
"""The text before a way's name in transformers' registry of attention functions."""
_UNKNOWN = {"s_aux": None, "position_bias": None, "is_causal": True}
"""The arguments of attention that change its result and that no way of ours knows, with the values that they may have."""
_WIDTH_ON_CPU, _WIDTH_ON_GPU = 8, 64
"""The numbers of which the padded width of rows is a multiple: on a GPU, the tiles of its matrix products."""
_SMALLEST_FLEX_HEAD, _LARGEST_FLASH_HEAD = 16, 256


@dataclass(frozen=True)
class AttentionChoice:
    """What a run asks for."""

    asked: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """The value of model.attention."""
    packed: bool = True
    """The value of data.packing."""


AUTO = AttentionChoice()


def way_problem(way: Way, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why attention cannot be computed in this way, on this device and in this type, with what to do about it; None: it can."""
    name, held = f"model.attention: {way}", str(dtype).removeprefix("torch.")
    if way == "sdpa":
        return None
    if device.type == "cpu":
        why = "has no backward pass on a CPU" if way == "flex" else "does not run on a CPU"
        return f"{name} {why}, and this machine has no GPU that torch can use\n  use auto or sdpa"
    if way == "flex":
        return None if dtype.itemsize <= 4 else f"{name} computes in bfloat16 or float32, but the model is in {held}\n  use auto or sdpa"
    if dtype not in kernels.HALF:
        return f"{name} computes in bfloat16, but the model is in {held}\n  use auto, or model.dtype=bfloat16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name} needs a GPU of compute capability 8.0 or higher (Ampere or newer)\n  use auto or flex"
    if kernels.flash_kernel() is None:
        return (
            f"{name}: the package flash-attn is not installed, and torch {torch.__version__} was built without flash attention\n"
            "  pip install flash-attn --no-build-isolation, or another torch; or use auto or flex"
        )
    return None


def pick_way(choice: AttentionChoice, model: Any) -> Way | None:
    """The way for this model on its device; None: transformers' own attention, for which it makes masks.

    `auto` takes flash attention where it can be had, else flex attention if rows are packed, else torch's fused attention. On a CPU, and
    for a model whose attention no way of ours computes, `auto` and `sdpa` leave it to transformers.

    Raises:
        UserError: the way that was asked for cannot be had.
    """
    if choice.asked in ("flex", "flash"):
        if (problem := _problem(choice.asked, model)) is not None:
            raise UserError(problem)
        return choice.asked
    if next(model.parameters()).device.type == "cpu":
        return None
    ways: tuple[Way, ...] = ("flash", "flex", "sdpa") if choice.packed else ("flash", "sdpa", "flex")
    return next((way for way in (ways if choice.asked == "auto" else ("sdpa",)) if _problem(way, model) is None), None)


def _problem(way: Way, model: Any) -> str | None:
    parameter = next(model.parameters())
    if (problem := way_problem(way, parameter.dtype, parameter.device)) is not None:
        return problem
    name, kind, config = f"model.attention: {way}", type(model).__name__, model.get_decoder().config
    # What transformers runs with flash attention is causal, perhaps with windows and soft caps, and nothing else.
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_flash_attn", False)):
        return f"{name} does not fit {kind}, whose attention is of another kind\n  use auto or sdpa"
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if way == "sdpa" and (capped or not getattr(model, "_supports_sdpa", False)):
        return f"{name} does not fit {kind}\n  use auto"
    if way == "flash" and capped and (kernel := kernels.flash_kernel()) and not kernel.has_softcap:
        return (
            f"{name}: {kind} has a soft cap on scores, which torch's own flash attention lacks\n  install flash-attn, or use auto or flex"
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if way == "flex" and width < _SMALLEST_FLEX_HEAD:
        return f"{name} needs heads of {_SMALLEST_FLEX_HEAD} elements or more, but those of {kind} have {width}\n  use auto or sdpa"
    if way == "flash" and width > _LARGEST_FLASH_HEAD:
        return f"{name} takes heads of {_LARGEST_FLASH_HEAD} elements at most, but those of {kind} have {width}\n  use auto, flex or sdpa"
    return None


def use_way(model: Any, way: Way) -> None:
    """Have the model's layers compute attention in this way from now on. `generating` and `leave_to_transformers` undo it."""
    _register()
    model.get_decoder().config._attn_implementation = _PREFIX + way


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Until the end of the block the model computes attention as transformers does, which knows caches of keys and values."""
    config = model.get_decoder().config
    before = config._attn_implementation
    leave_to_transformers(model)
    try:
        yield
    finally:
        config._attn_implementation = before


def leave_to_transformers(model: Any) -> None:
    """Have the model's layers compute attention as transformers does, from now on, if they do it in a way of ours."""
    config = model.get_decoder().config
    if str(config._attn_implementation).startswith(_PREFIX):
        config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"


def row_multiple(way: Way | None, device: torch.device, seq_len: int) -> int:
    """To a multiple of how many positions rows are padded.

    Flex attention is compiled for each width, so all its batches have one: `seq_len`, in whole blocks.
    """
    if way == "flex":
        return -(-seq_len // kernels.FLEX_BLOCK) * kernels.FLEX_BLOCK
    return _WIDTH_ON_CPU if device.type == "cpu" else _WIDTH_ON_GPU


@cache
def _register() -> None:
    from transformers import AttentionInterface

    # No mask function is registered under these names: for them transformers makes none.
    for way, kernel in _KERNELS.items():
        AttentionInterface.register(_PREFIX + way, _as_transformers_calls_it(kernel))


def _as_transformers_calls_it(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: Any,
        query_BHSE: Tensor,
        key_BGSE: Tensor,
        value_BGSE: Tensor,
        attention_mask: None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        attention_rows: AttentionRows | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        batch, _, length, width = query_BHSE.shape
        assert attention_mask is None, "a mask came with the model's input: use `generating`"
        assert key_BGSE.shape[2] == length, "there is a cache of keys: use `generating`"
        if unknown := [name for name, plain in _UNKNOWN.items() if others.get(name) is not None and others[name] is not plain]:
            raise UserError(
                f"{type(module).__name__} gives attention {unknown[0]}, which only transformers knows\n  set model.attention=sdpa"
            )
        softcap = others.get("softcap")
        rows = attention_rows or AttentionRows(None, batch, length, query_BHSE.device)
        scores = Scores(width**-0.5 if scaling is None else scaling, sliding_window, softcap)
        out_BHSE = kernel(query_BHSE, key_BGSE, value_BGSE, rows, scores)
        return out_BHSE.transpose(1, 2).contiguous(), None

    return attention
