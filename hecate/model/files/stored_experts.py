"""Finds the experts of an MoE checkpoint as byte ranges of its files, in any of the known layouts. It loads nothing and needs no torch.

Checkpoints store experts in one of two layouts. This module describes both in the same way, as an expert's gate, up and down in this order:

    fused       ...layers.3.mlp.experts.gate_up_proj [E, 2F, D], ...down_proj [E, D, F]         as transformers 5 holds them
                ...layers.3.block_sparse_moe.input_linear.weight, ...output_linear.weight       GraniteMoE, of the same shapes
    per expert  ...layers.3.mlp.experts.7.gate_proj.weight [F, D], up_proj, down_proj [D, F]    Qwen3-MoE, OLMoE
                ...layers.3.block_sparse_moe.experts.7.w1.weight [F, D], w3 [F, D], w2 [D, F]   Mixtral
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hecate.errors import UserError
from hecate.model.files.safetensors_headers import DTYPE_BYTES, StoredTensor
from hecate.parallel.values.expert_kinds import ExpertKind, kinds_for

EXPERTS = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)*?experts\.(.+)$")
_FUSED = ("gate_up_proj", "down_proj")
ROLES = {
    "gate_proj.weight": "gate",
    "up_proj.weight": "up",
    "down_proj.weight": "down",
    "w1.weight": "gate",
    "w3.weight": "up",
    "w2.weight": "down",
}
_GRANITE = {
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
}
"""The ends of names in GraniteMoE's files, and the ends of those names in the model."""


def usual_name(name: str) -> str:
    """The name of a stored tensor as other models call it, and as transformers 5 does in the model."""
    for stored, usual in _GRANITE.items():
        if name.endswith(stored):
            return name.removesuffix(stored) + usual
    return name


@dataclass(frozen=True)
class StoredPart:
    """`numel` elements of a tensor, in the order in which they are stored."""

    entry: StoredTensor
    first: int
    """The number of the part's first element in the tensor."""
    numel: int

    @property
    def offset(self) -> int:
        """The position of the part's first byte in the file."""
        return self.entry.start + self.first * DTYPE_BYTES[self.entry.dtype]


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer."""

    hidden: int
    ffn: int
    parts: tuple[tuple[StoredPart, ...], ...]
    """For each expert the parts that make up its flat chunk: gate [F, D], up [F, D], down [D, F]."""

    @property
    def num_experts(self) -> int:
        return len(self.parts)

    @property
    def expert_numel(self) -> int:
        return 3 * self.hidden * self.ffn


def expert_layers(entries: Mapping[str, StoredTensor], folder: Path) -> dict[int, LayerExperts]:
    """The layers that have experts, by number; none for a dense model.

    Raises:
        UserError: an expert is quantised, has biases or tensors of unknown meaning, lacks one, or has another shape than its neighbours; or
            two tensors are the same one's.
    """
    by_layer: dict[int, dict[str, StoredTensor]] = {}
    origins: dict[tuple[int, str], str] = {}
    for name, entry in entries.items():
        match = EXPERTS.search(usual_name(name))
        if match is not None:
            layer, rest = int(match[1]), match[2]
            other = origins.setdefault((layer, rest), name)
            if other != name:
                raise UserError(
                    f"{folder}: two tensors are {rest} of the experts of layer {layer}: {other} and {name}\n"
                    "  hecate trains the decoder layers alone: take a checkpoint without others, such as those of multi-token prediction"
                )
            by_layer.setdefault(layer, {})[rest] = entry
    return {layer: _layer(tensors, f"{folder}: layer {layer}") for layer, tensors in sorted(by_layer.items())}


def holds_experts(names: Iterable[str]) -> bool:
    """Whether tensors of these names belong to a model with experts, in whatever layout."""
    return any(EXPERTS.search(usual_name(name)) for name in names)


def refuse_experts(names: Iterable[str], where: Path, kind: ExpertKind) -> None:
    """Refuse an MoE model where a dense one is wanted, before anything is loaded.

    Args:
        names: of the model's tensors.

    Raises:
        UserError: some belong to experts, in whatever layout.
    """
    if holds_experts(names):
        why = (
            "adapters of linears need a dense one"
            if kind.over_linears
            else f"moe.family {kind.name} puts experts in the place of a dense FFN"
        )
        raise UserError(f"{where}: the model has experts already, but {why}\n  take {kinds_for(moe_base=True)}, or give a dense model")


def no_experts(where: Path, kind: ExpertKind) -> UserError:
    """The error for a dense model where one with experts is wanted."""
    return UserError(
        f"{where}: the model has no experts, but moe.family is {kind.name}\n  for a dense model take {kinds_for(moe_base=False)}"
    )


def no_gguf(path: Path | str, kind: ExpertKind) -> UserError:
    """The error for a GGUF file where a model's own experts are wanted."""
    return UserError(
        f"{path}: a GGUF file, which moe.family {kind.name} does not read\n  give a folder with config.json and *.safetensors as "
        "model.name_or_path"
    )


def _layer(tensors: dict[str, StoredTensor], where: str) -> LayerExperts:
    for name, entry in tensors.items():
        _check_kind(name, entry, where)
    if set(tensors) == set(_FUSED):
        return _fused(tensors[_FUSED[0]], tensors[_FUSED[1]], where)
    found: dict[int, dict[str, StoredTensor]] = {}
    for name, entry in tensors.items():
        number, _, rest = name.partition(".")
        if not number.isdecimal() or rest not in ROLES:
            raise UserError(
                f"{where}: its experts have the tensor {name}, of unknown meaning\n"
                f"  experts have {' and '.join(_FUSED)}, or NUMBER.gate_proj.weight, up_proj, down_proj (or w1, w3, w2)"
            )
        found.setdefault(int(number), {})[ROLES[rest]] = entry
    for expert in range(max(found) + 1):
        missing = [role for role in ("gate", "up", "down") if role not in found.get(expert, {})]
        if missing:
            raise UserError(f"{where}: expert {expert} has no {missing[0]} projection; is the download complete?")
    ffn, hidden = _two_sizes(found[0]["gate"], where)
    parts = []
    for expert in range(len(found)):
        shapes = tuple(found[expert][role].shape for role in ("gate", "up", "down"))
        if shapes != ((ffn, hidden), (ffn, hidden), (hidden, ffn)):
            raise UserError(f"{where}: expert {expert} has shapes {shapes}, but expert 0 has {ffn} x {hidden}; all must be alike")
        parts.append(tuple(StoredPart(found[expert][role], 0, ffn * hidden) for role in ("gate", "up", "down")))
    return LayerExperts(hidden, ffn, tuple(parts))


def _fused(gate_up: StoredTensor, down: StoredTensor, where: str) -> LayerExperts:
    three = len(gate_up.shape) == len(down.shape) == 3
    if not three or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        raise UserError(
            f"{where}: gate_up_proj is {list(gate_up.shape)} and down_proj {list(down.shape)}\n"
            "  supported: gate_up_proj [experts, 2 x ffn, hidden] with down_proj [experts, hidden, ffn]; transposed experts are not"
        )
    experts, hidden, ffn = down.shape
    half = hidden * ffn
    return LayerExperts(
        hidden, ffn, tuple((StoredPart(gate_up, 2 * e * half, 2 * half), StoredPart(down, e * half, half)) for e in range(experts))
    )


def _check_kind(name: str, entry: StoredTensor, where: str) -> None:
    if entry.dtype not in DTYPE_BYTES:
        raise UserError(
            f"{where}: experts.{name} is stored as {entry.dtype}: quantised experts are not supported\n"
            f"  take a checkpoint in {', '.join(sorted(DTYPE_BYTES))}, or dequantise this one and save it anew"
        )
    if "bias" in name:
        raise UserError(f"{where}: experts.{name}: experts with biases are not supported; they must be plain gated FFNs")


def _two_sizes(entry: StoredTensor, where: str) -> tuple[int, int]:
    if len(entry.shape) != 2:
        raise UserError(f"{where}: the gate projection of expert 0 is {list(entry.shape)}, not [ffn, hidden]")
    return entry.shape[0], entry.shape[1]
