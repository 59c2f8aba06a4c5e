"""What a LoRA in the format of PEFT 0.21 says of itself, and its tensors' names, also for an MoE model's experts (`target_parameters`).

PEFT wraps each parameter of an experts module, gate_up_proj first, so that its tensors lie under `base_layer` where both are adapted:

    base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight [E·r, D]   .lora_B.weight [2F, r·E]     gate_up_proj
    base_model.model.model.layers.3.mlp.experts.lora_A.weight            [E·r, F]   .lora_B.weight [D, r·E]      down_proj

How experts are joined, `hecate.adapters.places` says. Attention adapters and trained routers have PEFT's usual names.

Shapes: E experts, r rank, D hidden, F ffn, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hecate.adapters.card import GENERATE, Loading
from hecate.adapters.description import LARGEST, Description
from hecate.adapters.peft.targets import Targets, listed, require_sound
from hecate.adapters.places import Place
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import lora_scale

PEFT_TYPE = "LORA"
PREFIX = "base_model.model"
"""what PEFT puts before every dotted name"""
_LINEAR_A = re.compile(rf"{re.escape(PREFIX)}\.(.+)\.lora_A\.weight")
_EXPERTS = re.compile(rf"{re.escape(PREFIX)}\.(.+\.experts)(?:\.base_layer)?\.lora_[AB]\.weight")
_WITH_PEFT = """With PEFT:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)

PEFT warns of the key `hecate`, which it does not know and does not need.

With hecate:

"""
_NOT_READ = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "layers_to_transform", "exclude_modules", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "trainable_token_indices"),
)
"""PEFT's keys that change what an adapter computes and are not supported"""
_BASE_KEPT = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""PEFT's init_lora_weights that leave the base model as it is; the others, such as pissa, take the first B A from its weights"""


@dataclass(frozen=True, kw_only=True)
class LoraDescription(Description):
    """The description of a LoRA in PEFT's format, of linears, of an MoE model's experts, or of both."""

    what = "a LoRA, without routers of its own"
    loading = Loading("peft", ("lora",), _WITH_PEFT + GENERATE)
    target_modules: Targets
    """the adapted linear layers"""
    target_parameters: tuple[str, ...] = ()
    """the ends of the dotted names of the adapted parameters, such as mlp.experts.gate_up_proj"""
    expert_r: int | None = None
    """the rank of the experts' pairs, whose alpha is that of all; None: `r`"""
    modules_to_save: tuple[str, ...] = ()
    """the ends of the dotted names of the trained routers"""
    dropout: float = 0.0
    """the dropout that training used; PEFT has no dropout for such adapters"""

    @property
    def projections(self) -> tuple[str, ...]:
        """The last names of the adapted parameters, in the order in which PEFT wraps them."""
        last = {name.rpartition(".")[2] for name in self.target_parameters}
        return tuple(name for name in ("gate_up_proj", "down_proj") if name in last)

    @property
    def rank_of_experts(self) -> int:
        return self.r if self.expert_r is None else self.expert_r

    @property
    def scale_of_experts(self) -> float:
        """The factor of B A x of an expert's pair."""
        return lora_scale(self.alpha, self.rank_of_experts, rslora=self.use_rslora)

    def to_json(self) -> dict[str, Any]:
        """Return adapter_config.json as PEFT reads it, with further values under the key "hecate"."""
        return {
            **self.as_lora(PEFT_TYPE, 0.0),
            # The pattern is that of the linears: of one for parameters PEFT 0.21 says that it was ignored, though it is not.
            "r": self.rank_of_experts,
            "rank_pattern": {} if self.expert_r is None else dict.fromkeys(listed(self.target_modules), self.r),
            # An empty list is written as one: for null, PEFT would adapt the attention projections of model types that it supports.
            "target_modules": self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules),
            "target_parameters": list(self.target_parameters),
            "modules_to_save": list(self.modules_to_save) or None,
            "hecate": {"format_version": 1, "lora_dropout": self.dropout, "extra": dict(self.extra)},
        }

    def places(self, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
        """Modules have their dotted names in the model; of experts, such as model.layers.3.mlp.experts.gate_up_proj.7."""
        places: dict[str, Place] = {}
        for path in experts_paths(tensors):
            for projection, (name_a, name_b) in expert_names(path, self.projections).items():
                for expert in range(tensors[name_a].shape[0] // self.rank_of_experts if name_a in tensors else 1):
                    places[f"{path}.{projection}.{expert}"] = Place(name_a, name_b, expert)
        of_experts = {place.name_a for place in places.values()}
        linears = (match[1] for name in tensors if name not in of_experts and (match := _LINEAR_A.fullmatch(name)))
        return places | {path: Place(*linear_names(path)) for path in linears}

    def place(self, module: str) -> Place:
        path, _, number = module.rpartition(".")
        experts_path, _, projection = path.rpartition(".")
        if not number.isdigit() or projection not in self.projections:  # a linear's own name may be a number
            return Place(*linear_names(module))
        return Place(*expert_names(experts_path, self.projections)[projection], expert=int(number))


def expert_names(experts_path: str, projections: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Return the names of A and B of each projection.

    Args:
        experts_path: the dotted name of the experts module in the model.
        projections: the value of `LoraDescription.projections`.
    """
    names = {}
    for depth, projection in enumerate(reversed(projections)):
        module = f"{PREFIX}.{experts_path}" + ".base_layer" * depth
        names[projection] = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return names


def experts_paths(names: Iterable[str]) -> list[str]:
    """Return the dotted names of the experts modules that an adapter in PEFT's own form has pairs for, each once."""
    return list(dict.fromkeys(match[1] for name in names if (match := _EXPERTS.fullmatch(name))))


def linear_names(path: str) -> tuple[str, str]:
    """Return the names of A and B of an adapted linear layer."""
    return f"{PREFIX}.{path}.lora_A.weight", f"{PREFIX}.{path}.lora_B.weight"


def saved_name(path: str) -> str:
    """Return the name of the weight of a fully trained module."""
    return f"{PREFIX}.{path}.weight"


def lora_from_json(value: Any) -> LoraDescription:
    """Return the description of a LoRA that PEFT or hecate has written, of an MoE model's experts or of linear layers alone.

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
        if not 1 <= value[name] <= LARGEST:
            raise UserError(f"{name} must be from 1 to {LARGEST}, not {str(value[name])[:100]}")
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
    return LoraDescription(
        base_model_name_or_path=value["base_model_name_or_path"],
        r=value["r"],
        alpha=value["lora_alpha"],
        use_rslora=bool(value.get("use_rslora", False)),
        dropout=float(dropout),
        extra=ours.get("extra", {}),
        **{"target_modules": value.get("target_modules"), **lists},
    )
