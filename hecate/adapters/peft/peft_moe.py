"""Read and write adapters of an MoE model's experts in the format of PEFT 0.21 (LoRA with `target_parameters`).

PEFT wraps each parameter of an experts module, gate_up_proj first, so that its tensors lie under `base_layer` where both are adapted:

    base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight [E·r, D]   .lora_B.weight [2F, r·E]     gate_up_proj
    base_model.model.model.layers.3.mlp.experts.lora_A.weight            [E·r, F]   .lora_B.weight [D, r·E]      down_proj

A is expert-major, A.view(E, r, in); B is rank-major, B.view(out, r, E). Attention adapters and trained routers have PEFT's usual names.

Shapes: E experts, r rank, D hidden, F ffn, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hecate.adapters.folder import peft_type_of, write_adapter_folder
from hecate.adapters.peft.peft_targets import Targets, require_sound
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import lora_scale

PEFT_TYPE = "LORA"
PREFIX = "base_model.model"
"""what PEFT puts before every dotted name"""
_LARGEST = 10**6
"""of numbers in a description"""
_NOT_READ = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "layers_to_transform", "exclude_modules", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "trainable_token_indices"),
)
"""PEFT's keys that change what an adapter computes and are not supported"""
_BASE_KEPT = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""PEFT's init_lora_weights that leave the base model as it is; the others, such as pissa, take the first B A from its weights"""


@dataclass(frozen=True, kw_only=True)
class PeftMoeConfig:
    """The description of an adapter in PEFT's format."""

    base_model_name_or_path: str
    r: int
    alpha: int
    use_rslora: bool
    target_modules: Targets
    """the adapted linear layers"""
    target_parameters: tuple[str, ...]
    """the ends of the dotted names of the adapted parameters, such as mlp.experts.gate_up_proj"""
    modules_to_save: tuple[str, ...] = ()
    """the ends of the dotted names of the trained routers"""
    dropout: float = 0.0
    """the dropout that training used; PEFT has no dropout for such adapters"""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return lora_scale(self.alpha, self.r, rslora=self.use_rslora)

    @property
    def projections(self) -> tuple[str, ...]:
        """The last names of the adapted parameters, in the order in which PEFT wraps them."""
        last = {name.rpartition(".")[2] for name in self.target_parameters}
        return tuple(name for name in ("gate_up_proj", "down_proj") if name in last)


def expert_names(experts_path: str, projections: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Return the names of A and B of each projection.

    Args:
        experts_path: the dotted name of the experts module in the model.
        projections: the value of `PeftMoeConfig.projections`.
    """
    names = {}
    for depth, projection in enumerate(reversed(projections)):
        module = f"{PREFIX}.{experts_path}" + ".base_layer" * depth
        names[projection] = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return names


def linear_names(path: str) -> tuple[str, str]:
    """Return the names of A and B of an adapted linear layer."""
    return f"{PREFIX}.{path}.lora_A.weight", f"{PREFIX}.{path}.lora_B.weight"


def saved_name(path: str) -> str:
    """Return the name of the weight of a fully trained module."""
    return f"{PREFIX}.{path}.weight"


def join_a(a_ErI: Tensor) -> Tensor:
    """Join the A of all experts into PEFT's [E·r, I]."""
    return a_ErI.flatten(0, 1)


def join_b(b_EOr: Tensor) -> Tensor:
    """Join the B of all experts into PEFT's [O, r·E]."""
    return b_EOr.permute(1, 2, 0).flatten(1)


def expert_a(joined: Tensor, expert: int, experts: int) -> Tensor:
    """Return the A of one expert, [r, I], from PEFT's [E·r, I]."""
    return joined.view(experts, -1, joined.shape[1])[expert]


def expert_b(joined: Tensor, expert: int, experts: int) -> Tensor:
    """Return the B of one expert, [O, r], from PEFT's [O, r·E]."""
    return joined.view(joined.shape[0], -1, experts)[:, :, expert]


def save_peft_adapter(folder: Path, tensors: Mapping[str, Tensor], config: PeftMoeConfig, card: bytes | None = None) -> None:
    """Write the adapter to the new folder `folder`, as PEFT's `save_pretrained` does.

    Args:
        card: the model card; None: that of adapters as a run leaves them.

    Raises:
        UserError: the folder exists, a tensor is not finite, or the disk fails.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"the adapter cannot be saved to {folder}: {name} is not finite")
    write_adapter_folder(folder, tensors, peft_config_to_json(config), card)


def peft_config_to_json(config: PeftMoeConfig) -> dict[str, Any]:
    """Return adapter_config.json as PEFT reads it, with further values under the key "hecate"."""
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.use_rslora,
        # An empty list is written as one: for null, PEFT would adapt the attention projections of model types that it supports.
        "target_modules": config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules),
        "target_parameters": list(config.target_parameters),
        "modules_to_save": list(config.modules_to_save) or None,
        "hecate": {"format_version": 1, "lora_dropout": config.dropout, "extra": dict(config.extra)},
    }


def is_peft_adapter(folder: Path) -> bool:
    """Return whether the folder's configuration is of PEFT's format. Raises UserError as `peft_type_of`."""
    return peft_type_of(folder) == PEFT_TYPE


def peft_config_from_json(value: Any) -> PeftMoeConfig:
    """Return the description of a LoRA that PEFT or `save_peft_adapter` has written, of an MoE model's experts or of linear layers alone.

    Raises:
        UserError: a key is missing or wrong, or the adapter is of another kind.
    """
    if not isinstance(value, dict):
        raise UserError("not a JSON object")
    if isinstance(alpha := value.get("lora_alpha"), float) and alpha.is_integer():  # as prime-rl writes it
        value = value | {"lora_alpha": int(alpha)}
    for name, kind in (("base_model_name_or_path", str), ("r", int), ("lora_alpha", int)):
        if type(value.get(name)) is not kind:
            raise UserError(f"{name} must be {'text' if kind is str else 'a whole number'}, not {str(value.get(name))[:100]}")
    for name in ("r", "lora_alpha"):
        if not 1 <= value[name] <= _LARGEST:
            raise UserError(f"{name} must be from 1 to {_LARGEST}, not {str(value[name])[:100]}")
    for name in _NOT_READ:
        if value.get(name):
            raise UserError(f"{name}: {str(value[name])[:100]}: adapters with it are not supported")
    if (begun := value.get("init_lora_weights")) not in _BASE_KEPT:
        raise UserError(
            f"init_lora_weights: {str(begun)[:100]}: the adapter is for a base model whose weights PEFT changes first\n"
            "  convert it to an ordinary LoRA: PEFT's save_pretrained with path_initial_model_for_weight_conversion"
        )
    if value.get("bias", "none") != "none":
        raise UserError("bias: only none is supported")
    lists = {}
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        given = value.get(name) or []
        if name == "target_modules" and isinstance(given, str):
            require_sound(given, name)
            continue
        if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
            raise UserError(f"{name} must be a list of names, not {str(given)[:100]}")
        lists[name] = tuple(sorted(given))
    if not value.get("target_modules") and not lists["target_parameters"]:
        raise UserError("neither target_modules nor target_parameters name a layer, so that the adapter has none")
    ours = value.get("hecate") or {}
    if not isinstance(ours, dict) or not isinstance(ours.get("extra", {}), dict):
        raise UserError("hecate and hecate.extra must be objects")
    dropout = ours.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"hecate.lora_dropout must be a number from 0 to below 1, not {str(dropout)[:100]}")
    return PeftMoeConfig(
        base_model_name_or_path=value["base_model_name_or_path"],
        r=value["r"],
        alpha=value["lora_alpha"],
        use_rslora=bool(value.get("use_rslora", False)),
        dropout=float(dropout),
        extra=ours.get("extra", {}),
        **{"target_modules": value.get("target_modules"), **lists},
    )
