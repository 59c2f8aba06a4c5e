"""What their file trains, and at which modules: LoRA beside linears, or at the experts of a model that has some."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from hecate.apps.convert.answer import Answer, Theirs, carry, left, off, refused

PLAIN_LORA = {"moe.unit": "linear", "moe.num_experts": 1, "moe.top_k": 1}
_OF_EXPERTS = {"w1": ["gate_proj"], "w3": ["up_proj"], "w2": ["down_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""names that experts' projections have in some models or in PEFT's target_parameters, as hecate calls them"""
_MOE_NAMES = re.compile(r"moe|mixtral|\d+x\d+b|-a\d+(\.\d+)?b|gpt-oss|deepseek-v[23]|glm-4\.\d|llama-4", re.IGNORECASE)
_FULL = (
    "hecate trains experts and adapters, not a dense model as it is: LoRA is nearest (adapter: lora, finetuning_type: lora or use_peft: "
    "true in their file); moe.family=full trains experts that start as copies of the FFNs"
)


def has_experts(theirs: Theirs) -> bool:
    """Whether the base model has experts: its config.json says it, or else its name."""
    name = str(theirs.get("base_model", "model_name_or_path"))
    try:
        sizes = json.loads((theirs.path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return bool(_MOE_NAMES.search(name))
    return any(sizes.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def method(name: str, value: Any, theirs: Theirs) -> Answer:
    """adapter, finetuning_type, use_peft: LoRA, or all of the model."""
    if not (value is True or str(value) in ("lora", "qlora")):
        return refused(_FULL if off(value) or value == "full" else f"hecate has no {value}; LoRA is nearest")
    if not has_experts(theirs):
        return carry(PLAIN_LORA, "plain LoRA: one pair for each linear, and no router")
    balanced = isinstance(config := theirs.get("model_config"), dict) and config.get("output_router_logits")
    loss = {} if balanced or theirs.get("router_aux_loss_coef") else {"moe.router_aux_loss_coef": 0.0}
    return carry({"moe.family": "moe_lora", **loss}, "the base has experts; routers stay as they are")


def stage(name: str, value: Any, theirs: Theirs) -> Answer:
    if value in ("sft", "pt", None):
        return left("hecate trains on answers and on plain text, as its records are")
    return refused("hecate learns from answers and plain text, not by preferences or rewards")


def quantised(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value):
        return Answer("the default already", "the base is not quantised")
    return refused(f"hecate trains over a base in bfloat16 or float32, which takes more memory: --drop {name} does so")


def all_linears(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value):
        return Answer("the default already", "lora.target_modules says which")
    return Answer("the default already", "lora.target_modules: all seven linears of a decoder layer")


def targets(name: str, value: Any, theirs: Theirs) -> Answer:
    if name == "lora_target_parameters" and off(value):
        return Answer("the default already", "none")
    if not off(theirs.get("lora_target_linear")):
        return left("lora_target_linear says all of them")
    if off(value):
        # What PEFT takes for Llama, Mistral, Qwen and Gemma.
        return refused("name the modules") if theirs.trainer == "axolotl" else carry({"lora.target_modules": ["q_proj", "v_proj"]})
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
    if names in (["all"], ["all-linear"]):
        return all_linears(name, True, theirs)
    if name == "lora_target_parameters":
        names += theirs.get("lora_target_modules") or []
    elif parameters := theirs.get("lora_target_parameters"):
        names += parameters
    modules = list(dict.fromkeys(module for one in names for module in _module(str(one), experts=has_experts(theirs))))
    if has_experts(theirs) and not {"gate_proj", "up_proj", "down_proj"} & set(modules):
        return refused("hecate trains LoRA at a model's experts: name gate_proj, up_proj and down_proj, too, or --drop it for all")
    return carry({"lora.target_modules": modules})


def _module(name: str, *, experts: bool) -> Iterable[str]:
    last = name.rpartition(".")[2]
    return _OF_EXPERTS.get(last, [last]) if experts else [last if re.fullmatch(r"[\w.]+", name) else name]
