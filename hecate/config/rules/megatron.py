"""Check the rules of configurations with `model.front_end: megatron`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

from hecate.config.files.paths import find_model
from hecate.config.problems import Add, serves, shorten
from hecate.config.schema import MEGATRON_EP
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import KINDS, kind_of

if TYPE_CHECKING:
    from hecate.config.gpt_shape import GptShape

_HECATE_LAYERS_ONLY = {
    "fssdp.plan": "history",
    "fssdp.rematerialize": False,
    "fssdp.prefetch": 1,
    "fssdp.max_imbalance": None,
    "fssdp.memory_slots": None,
    "fssdp.redundancy": 0,
    "fssdp.reshard_interval": None,
    "model.tensor_parallel": 1,
    "kernels": "auto",
}
"""the keys that only hecate's layers use, with the values that Megatron's layers accept"""


def check_megatron(values: Mapping[str, Any], add: Add) -> None:
    """Add the problems of a run with the Megatron front end: values that it does not support and keys that it needs."""
    from hecate.config.gpt_shape import gpt_shape  # imports numpy, which most runs' launchers do not need

    where = "with model.front_end=megatron"
    kind = kind_of(values.get("moe.family", ""), "ffn")
    if kind is not None and kind.has_pairs:
        fitting = " or ".join(other.name for other in KINDS.values() if not other.has_pairs)
        add("moe.family", f"must be {fitting} {where}: the model is built from scratch, so there are no weights to adapt", "")
    if values.get("eval.generate"):
        add(
            "eval.generate",
            f"is not supported {where}",
            "set it to false, and run hecate generate on the model folder that the run writes",
        )
    experts, top_k = values.get("moe.num_experts"), values.get("moe.top_k")
    if isinstance(experts, tuple):
        add("moe.num_experts", f"must be one number {where}: every layer has experts", "")
        experts = None
    if "model.name_or_path" in values:
        try:
            shape = gpt_shape(values["model.name_or_path"])
        except UserError as error:
            what, _, hint = str(error).partition("\n")
            add("model.name_or_path", what, hint)
        else:
            layers = values.get("model.num_hidden_layers")
            if layers is not None and layers > shape.layers:
                add("model.num_hidden_layers", f"{layers}, but the model has only {shape.layers}", "")
            _check_tensor_parallel(values, shape, add)
            fewest, per_token = experts or shape.experts, top_k or shape.top_k
            if (experts is None or top_k is None) and per_token > fewest:
                add("moe.top_k", f"must be from 1 to {fewest}, the experts of a layer, got {per_token}", "")
    _check_tokenizer(values, add)


def check_megatron_ep(values: Mapping[str, Any], add: Add) -> None:
    """Add the problems of `fssdp.policy: megatron_ep`: keys that Megatron's own layers do not use."""
    if values.get("fssdp.policy") != MEGATRON_EP:
        return
    if values.get("model.front_end") == "transformers":
        add(
            "fssdp.policy",
            "megatron_ep needs model.front_end=megatron: no other model has its layers",
            "use static_ep: it places experts the same way",
        )
    why = "belongs to hecate's own layers, which fssdp.policy=megatron_ep replaces"
    for key, default in _HECATE_LAYERS_ONLY.items():
        if key in values and not serves(key, values[key], default):
            add(key, why, "leave it out")


def _check_tensor_parallel(values: Mapping[str, Any], shape: GptShape, add: Add) -> None:
    key = "model.tensor_parallel"
    size, ranks = values.get(key, 1), values.get("nproc")
    if size < 2:
        return
    whole = gcd(shape.heads, shape.key_value_heads, ranks or 0)
    hint = f"give one of {', '.join(str(number) for number in range(1, whole + 1) if whole % number == 0)}: each rank has whole heads"
    for what, number in (("attention heads", shape.heads), ("heads of keys and values", shape.key_value_heads)):
        if number % size:
            add(key, f"must divide the model's {number} {what}, got {size}", hint)
            break
    if ranks is not None and ranks % size:
        add(key, f"must divide the number of ranks, which is {ranks} (nproc), got {size}", hint)
    redundancy = values.get("fssdp.redundancy", 0)
    if redundancy and values.get("fssdp.shard_size") is not None:
        what = f"does not work together with {key} and fssdp.shard_size yet: a lost tensor group may be in several sharding groups"
        add("fssdp.redundancy", what, "set fssdp.shard_size=null, whose experts have backups in other tensor groups, or leave it at 0")
    elif redundancy and ranks is not None and ranks // size <= redundancy:
        what = f"{redundancy} needs more tensor groups than that, for one that is lost has all copies of its weights, got {ranks // size}"
        add("fssdp.redundancy", what, f"leave it at 0, or take {size * (redundancy + 1)} ranks or more")


def _check_tokenizer(values: Mapping[str, Any], add: Add) -> None:
    if "model.tokenizer" not in values:
        return
    name = values["model.tokenizer"]
    if name is None:
        add("model.tokenizer", "must be given with model.front_end=megatron", "a tokenizer's folder, or a model to take it from")
    elif os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "tokenizer.json")):
            add("model.tokenizer", f"no tokenizer.json in the folder {shorten(name)}", "save a fast tokenizer there")
    else:
        try:
            find_model(name)
        except UserError as error:
            what, _, hint = str(error).partition("\n")
            add("model.tokenizer", what, hint)
