"""Check the keys of a router that decides by the sample's user, and of the users' features."""

import os
from collections.abc import Mapping
from typing import Any

from hecate.config.expert_keys import DEFAULT_EXPERTS
from hecate.config.files.paths import indexed_prefix
from hecate.config.problems import Add, shorten
from hecate.parallel.values.expert_kinds import MIXES_ON_EVERY_RANK

_USER = "moe.router.input=user"
OWN_KEYS = ("moe.router.input", "moe.router.temperature", "moe.router.mix")
"""the keys of moe.router that are about users"""


def check_features(values: Mapping[str, Any], add: Add, *, by_user: bool) -> None:
    """Add the problems of data.features, and of data that cannot name users."""
    key = "data.features"
    path = values.get(key)
    if not by_user:
        if path is not None:
            add(key, f"is read with {_USER} only", "leave it out, or set the router's input")
        return
    if key in values and path is None:
        add(key, f"must be given with {_USER}: an .npz file with the arrays ids and features", "examples/reclora/movielens.py makes one")
    elif path is not None and not os.path.isfile(path):
        add(key, f"no such file: {shorten(path)}", "relative paths start from the working directory")
    for which in ("data.train", "data.eval"):
        for i, source in enumerate(values.get(which, ())):
            if indexed_prefix(source.path) is not None:
                what = f"is an indexed data set, whose documents name no users, but {_USER} needs the user of each sample"
                add(f"{which}[{i}].path", what, 'use a JSONL file with a key "user" in each line')


def check_user(values: Mapping[str, Any], changed: Mapping[str, Any], add: Add) -> None:
    """Add the problems of keys that do not go together with `moe.router.input: user`.

    Args:
        changed: the keys of moe.router that have other values than their defaults.
    """
    for key in changed:
        if key not in OWN_KEYS:
            add(key, f"has no effect with {_USER}, whose gates give every token to all experts of a linear", "leave it out")
    if values.get("moe.unit") == "ffn":
        add("moe.router.input", "user needs moe.unit=linear, whose experts are pairs that can be mixed", "set moe.unit=linear")
    if values.get("moe.top_k") not in (None, most_experts(values)):  # the number of experts is what a run's own config.yaml says
        add("moe.top_k", f"is {values['moe.top_k']}, but with {_USER} every token goes to all experts", "leave it out")
    coefficient = values.get("moe.router_aux_loss_coef")
    if coefficient:
        what = f"must be 0 with {_USER}, where every expert is used by every sample and nothing is to balance, got {coefficient}"
        add("moe.router_aux_loss_coef", what, "set moe.router_aux_loss_coef=0")
    on_every_rank = values.get("moe.router.mix") in MIXES_ON_EVERY_RANK
    if on_every_rank and (rule := values.get("lora.gradient_rule", "none")) != "none":
        what = f"{rule} is about the rows of one pair, but moe.router.mix={values['moe.router.mix']} adds up those of all pairs"
        add("lora.gradient_rule", what, "leave it out, or use moe.router.mix=products")
    if on_every_rank and isinstance(values.get("lora.r"), tuple):
        what = (
            f"must be one rank with moe.router.mix={values['moe.router.mix']}: pairs of several ranks, each scaled by its own, have no sum"
        )
        add("lora.r", what, "give one number, or use moe.router.mix=products")
    slots, most = values.get("fssdp.memory_slots"), most_experts(values)
    if most == 1:
        key = "moe.num_experts" if values.get("moe.allocation") is None else "moe.allocation"
        what = f"gives each linear one expert, but {_USER} mixes several, and a gate over one has nothing to decide"
        add(key, what, "give 2 experts at least, or leave the router's input out")
    if slots is not None and on_every_rank and slots < most:
        what = f"must be {most} at least with moe.router.mix={values['moe.router.mix']}, which needs all experts on every rank, got {slots}"
        add("fssdp.memory_slots", what, "leave it out, or use mix=products, whose tokens may travel")


def most_experts(values: Mapping[str, Any]) -> int:
    """The experts of the layer with the most; 0: not known, because there is another problem."""
    counts = values.get("moe.allocation") or values.get("moe.num_experts", 0)
    counts = DEFAULT_EXPERTS if counts is None else counts
    return max(counts, default=0) if isinstance(counts, tuple) else counts
