"""Compiles all that a MixLoRA layer launches, forward and backward, for GPUs that are not here, and prints what it costs as JSON.

python -m tests.kernels.mixlora_compile [SM ...]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass

import torch

from hecate.kernels.ahead_of_time import SMS, compiling_for, machine_code
from hecate.kernels.dropout import Dropout
from hecate.kernels.kernel_launch import Launch, recorded
from hecate.kernels.mixlora_inputs import PROJECTIONS, FfnBase, Lora
from hecate.kernels.mixlora_sorted import backward_passes, forward_arguments, forward_passes


@dataclass(frozen=True)
class Layer:
    """What tells compiled kernels apart."""

    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    pair_dtype: torch.dtype = torch.float32
    activation: str = "silu"
    dropout: float = 0.0
    projections: tuple[str, ...] = PROJECTIONS
    k: int = 2


LAYERS = {
    "r 16": Layer(),
    "r 16, bf16 pairs": Layer(pair_dtype=torch.bfloat16),
    "r 16, dropout, gelu": Layer(dropout=0.1, activation="gelu"),
    "r 3, fp16, gelu_tanh, k 8": Layer(rank=3, dtype=torch.float16, activation="gelu_tanh", k=8),
    "r 32, dropout": Layer(rank=32, dropout=0.1),
    "r 64, dropout": Layer(rank=64, dropout=0.1),
    "r 128, dropout": Layer(rank=128, dropout=0.1),
    "r 256, dropout": Layer(rank=256, dropout=0.1),
    "r 16, fp32, dropout": Layer(dtype=torch.float32, dropout=0.1),
    "r 64, fp32": Layer(dtype=torch.float32, rank=64),
    "r 256, fp32, dropout": Layer(dtype=torch.float32, rank=256, dropout=0.1),
    "r 16, gate only": Layer(projections=("gate_proj",)),
    "r 16, down only, dropout": Layer(projections=("down_proj",), dropout=0.1),
}


def launches(layer: Layer, *, tokens: int = 8192, hidden: int = 4096, ffn: int = 14336, slots: int = 8) -> list[Launch]:
    """Those of one layer, forward and backward, on meta tensors; under `compiling_for`."""

    def empty(*shape: int, dtype: torch.dtype = layer.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    base = FfnBase(empty(ffn, hidden), empty(ffn, hidden), empty(hidden, ffn), layer.activation)
    loras = {}
    for name in layer.projections:
        inputs, outputs = (ffn, hidden) if name == "down_proj" else (hidden, ffn)
        a, b = (empty(slots, *shape, dtype=layer.pair_dtype) for shape in ((layer.rank, inputs), (outputs, layer.rank)))
        loras[name] = Lora(a, b, 2.0)
    x, weight = empty(tokens, hidden), empty(tokens, layer.k, dtype=torch.float32)
    arguments = forward_arguments(
        x,
        empty(tokens, layer.k, dtype=torch.int64),
        weight,
        base,
        loras,
        dropout=Dropout(layer.dropout, key=77) if layer.dropout else None,
        token_T=empty(tokens, dtype=torch.int64),
        expert_S=empty(slots, dtype=torch.int64),
    )
    with recorded() as found:
        y, *kept = forward_passes(*arguments)
        backward_passes(torch.empty_like(y), x, weight, *kept, *arguments[2:])
    return found


def main() -> None:
    found = {}
    for sm in map(int, sys.argv[1:] or SMS):
        with compiling_for(sm):
            for name, layer in LAYERS.items():
                for place, launch in enumerate(launches(layer)):
                    code = machine_code(launch)
                    key = f"sm_{sm} {name} {place} {launch.kernel.__name__}"
                    found[key] = {"spills": code.spills, **dataclasses.asdict(code)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
