"""Choose the implementation that computes a layer's experts: Triton kernels, the fast torch path, or the plain formula."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hecate.kernels.common.low_rank import MAX_RANK, lora_linear

Backend = Literal["auto", "triton", "torch", "reference"]
"""auto: Triton on CUDA tensors if it supports them, torch otherwise. triton: Triton or an error; on CPU tensors its interpreter, for
tests. torch: the fast path in plain torch. reference: the formula, slot by slot."""


@dataclass(frozen=True)
class ExpertKernels:
    """What the kinds of experts compute, and a frozen linear layer with one low-rank pair.

    The fast torch versions document their arguments and results.
    """

    mixlora_ffn: Callable[..., Tensor]
    full_ffn: Callable[..., Tensor]
    moe_lora_ffn: Callable[..., Tensor]
    routed_pairs: Callable[..., Tensor]
    sorted_pairs: Callable[..., Tensor]
    mixed_factors: Callable[..., Tensor]
    lora_linear: Callable[..., Tensor]


def expert_kernels(backend: Backend, x: Tensor, rank: int = 0) -> ExpertKernels:
    """Return the implementation for tensors of the device and type of `x`.

    Args:
        rank: the largest rank of the experts' low-rank pairs.

    Raises:
        ValueError: `backend` is triton and Triton cannot compute this.
    """
    if backend == "auto":
        # Triton has no kernels for the CPU, for float64 and for ranks whose blocks would not fit.
        return _triton() if x.device.type == "cuda" and triton_problem(x.device.type, x.dtype, rank) is None else _torch()
    if backend == "torch":
        return _torch()
    if backend == "reference":
        return _reference()
    problem = triton_problem(x.device.type, x.dtype, rank)
    if problem is not None:
        raise ValueError(problem)
    return _triton()


def triton_problem(device: str, dtype: torch.dtype | None = None, rank: int = 0) -> str | None:
    """Return why the Triton kernels cannot run on a kind of device, in `dtype` (None: any) and with this LoRA rank; None if they can."""
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "kernels: triton needs a CUDA GPU, and this machine has none.\n"
            "Use auto or torch; for tests, TRITON_INTERPRET=1 runs the kernels on a CPU, slowly."
        )
    if dtype is not None and dtype.itemsize > 4:
        return "kernels: triton computes in float32, bfloat16 or float16, not in float64; use auto or torch"
    if rank > MAX_RANK:
        return f"kernels: triton takes LoRA ranks up to {MAX_RANK}, got {rank}; use auto or torch"
    return None


# Triton is imported inside functions: it exists on Linux only, and the import of the first kernel decides whether it interprets.


@functools.cache
def _triton() -> ExpertKernels:
    from hecate.kernels.common.lora_linear import lora_linear_triton
    from hecate.kernels.experts.full_operators import full_ffn_triton
    from hecate.kernels.experts.mixed_factors import mixed_factors  # GEMMs over all tokens, at which torch is as good
    from hecate.kernels.experts.moe_lora_operators import moe_lora_ffn_triton
    from hecate.kernels.experts.routed_pairs_triton import routed_pairs_triton, sorted_pairs_triton
    from hecate.kernels.mixlora.operators import mixlora_ffn_triton

    return ExpertKernels(
        mixlora_ffn=mixlora_ffn_triton,
        full_ffn=full_ffn_triton,
        moe_lora_ffn=moe_lora_ffn_triton,
        routed_pairs=routed_pairs_triton,
        sorted_pairs=sorted_pairs_triton,
        mixed_factors=mixed_factors,
        lora_linear=lora_linear_triton,
    )


@functools.cache
def _torch() -> ExpertKernels:
    from hecate.kernels.experts.mixed_factors import mixed_factors
    from hecate.kernels.experts.routed_pairs import routed_pairs, sorted_pairs
    from hecate.kernels.experts.torch_path import full_ffn, moe_lora_ffn
    from hecate.kernels.mixlora.torch_path import mixlora_ffn

    return ExpertKernels(
        mixlora_ffn=mixlora_ffn,
        full_ffn=full_ffn,
        moe_lora_ffn=moe_lora_ffn,
        routed_pairs=routed_pairs,
        sorted_pairs=sorted_pairs,
        mixed_factors=mixed_factors,
        lora_linear=lora_linear,
    )


@functools.cache
def _reference() -> ExpertKernels:
    from hecate.kernels.experts.reference import (
        full_ffn_reference,
        mixed_factors_reference,
        moe_lora_ffn_reference,
        routed_pairs_reference,
    )
    from hecate.kernels.mixlora.reference import mixlora_ffn_reference

    return ExpertKernels(
        mixlora_ffn=mixlora_ffn_reference,
        full_ffn=full_ffn_reference,
        moe_lora_ffn=moe_lora_ffn_reference,
        routed_pairs=routed_pairs_reference,
        sorted_pairs=routed_pairs_reference,
        mixed_factors=mixed_factors_reference,
        lora_linear=lora_linear,
    )
