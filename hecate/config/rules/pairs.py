"""Check what goes together with the pairs of LoRA matrices: their source, their ranks, and the gradient rule."""

from collections.abc import Mapping
from typing import Any

from hecate.config.expert_keys import DEFAULT_EXPERTS
from hecate.config.problems import Add, or_default, serves
from hecate.config.schema import LEAVES
from hecate.parallel.values.expert_kinds import kind_of

_PREFIX = "lora.shards."
_SHARDS = "lora.pairs=shards"


def check_pairs(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of the keys below `lora`, given the typed values of all dotted keys.

    What depends on the model's sizes is checked in `hecate.model.sizes.pair_check`.
    """
    alpha = values.get("lora.alpha")
    if alpha is not None and alpha > 0 and not float(alpha).is_integer():
        add("lora.alpha", f"must be a whole number, got {alpha}", "adapter files can store no other")
    _check_ranks(values, add)
    _check_experts(values, add)
    _check_gradient_rule(values, add)
    _check_nola(values, add)
    _check_shards(values, add)


def largest_rank(values: Mapping[str, Any]) -> int:
    """The rank of the widest pair; 0 if `lora.r` has a problem."""
    ranks = values.get("lora.r", 0)
    return max(ranks, default=0) if isinstance(ranks, tuple) else int(ranks)


def _check_ranks(values: Mapping[str, Any], add: Add) -> None:
    key, ranks = "lora.r", values.get("lora.r")
    if not isinstance(ranks, tuple):
        return
    if not ranks:
        add(key, "must be a number, or a list with one for each expert", "")
        return
    for other, allowed in (("lora.pairs", "plain"), ("lora.gradient_rule", "none")):
        if values.get(other, allowed) != allowed:
            add(key, f"must be one number with {other}={values[other]}, got a list of {len(ranks)}", f"give one, or {other}={allowed}")
    kind = kind_of(values.get("moe.family", ""), values.get("moe.unit", "ffn"))
    if kind is not None and (kind.of_moe_base or not kind.has_pairs):
        add(key, f"must be one number with moe.family={kind.name}, got a list of {len(ranks)}", "give one")
        return
    given = "moe.num_experts" if values.get("moe.allocation") is None else "moe.allocation"
    counts = or_default(values, given, DEFAULT_EXPERTS)
    if counts is None:
        return
    others = sorted({count for count in ((counts,) if isinstance(counts, int) else counts) if count not in (0, len(ranks))})
    if others:
        what = f"lists the ranks of {len(ranks)} experts, but {given} gives layers {', '.join(map(str, others))}"
        add(key, what, f"give one rank for all, or every layer that has experts {len(ranks)} of them")


def _check_experts(values: Mapping[str, Any], add: Add) -> None:
    chosen: Any = values.get("lora.experts")
    hottest, loads = values.get("lora.hottest_experts"), values.get("lora.loads")
    listed = [one for one in chosen or () if isinstance(one, tuple | list)]
    if chosen == () or (listed and not any(listed)):
        add("lora.experts", "names no expert", "leave it out: all experts train then")
    elif listed and len(listed) < len(chosen):
        add("lora.experts", "has numbers beside lists", "give numbers for all layers alike, or one list for each layer")
    for of_layer in listed or [chosen or ()]:
        if len(set(of_layer)) < len(of_layer):
            add("lora.experts", f"lists an expert twice, got {list(of_layer)}", "keep one of the two")
            break
    if hottest is not None and chosen is not None:
        add("lora.hottest_experts", "cannot be given with lora.experts, which names the experts", "leave one of the two out")
    if hottest is not None and "lora.loads" in values and loads is None:
        add("lora.hottest_experts", "needs lora.loads: whose loads say which experts are hot", "set lora.loads=RUN/loads")
    if loads is not None and "lora.hottest_experts" in values and hottest is None:
        add("lora.loads", "is read with lora.hottest_experts only", "leave it out, or set lora.hottest_experts")
    for key in ("lora.moe_rank_scaling", "lora.experts", "lora.hottest_experts"):
        for other, allowed in (("lora.pairs", "plain"), ("lora.gradient_rule", "none")):
            if values.get(key) and values.get(other, allowed) != allowed:
                add(key, f"needs {other}={allowed}, got {values[other]}", f"leave it out, or set {other}={allowed}")


def _check_gradient_rule(values: Mapping[str, Any], add: Add) -> None:
    rule, eta = values.get("lora.gradient_rule"), values.get("lora.eta")
    if rule not in (None, "row_norm") and eta is not None:
        add("lora.eta", f"is read with lora.gradient_rule=row_norm only, got {eta}", "leave it out, or set the rule")
    if rule not in (None, "none") and values.get("kernels") == "triton" and largest_rank(values) > 128:
        what = f"triton takes LoRA ranks up to 128 with lora.gradient_rule={rule}, but lora.r is {largest_rank(values)}"
        add("kernels", what, "use auto")
    if rule != "row_norm":
        return
    if "lora.eta" in values and eta is None:
        add("lora.eta", "must be given with lora.gradient_rule=row_norm", "ALLoRA's own values are 1, 1.414 and 2")
    if values.get("lora.alpha") is not None:
        hint = "leave it out: the rule has eta in its place"
        add("lora.alpha", f"has no meaning with lora.gradient_rule=row_norm, got {values['lora.alpha']}", hint)
    if values.get("lora.use_rslora"):
        add("lora.use_rslora", "has no meaning with lora.gradient_rule=row_norm, which scales nothing", "leave it out")
    if values.get("lora.dropout"):
        add("lora.dropout", f"must be 0 with lora.gradient_rule=row_norm, got {values['lora.dropout']}", "set lora.dropout=0")


def _check_nola(values: Mapping[str, Any], add: Add) -> None:
    key, pairs = "lora.nola.bases", values.get("lora.pairs")
    if pairs is not None and pairs != "nola" and key in values and values[key] != LEAVES[key].default:
        add(key, f"is read with lora.pairs=nola only, got {values[key]}", "leave it out, or set lora.pairs=nola")
    if pairs != "nola":
        return
    if (rule := values.get("lora.gradient_rule", "none")) != "none":
        what = f"{rule} is about rows of A and B that train by themselves, but with lora.pairs=nola all rows share their coefficients"
        add("lora.gradient_rule", what, "leave it out, or use lora.pairs=plain")
    if values.get("lora.init_from") is not None:
        what = "cannot be given with lora.pairs=nola: A and B of an adapter do not say by which coefficients they were made"
        add("lora.init_from", what, "leave it out, or use lora.pairs=plain, which trains the adapter's own A and B on")


def _check_shards(values: Mapping[str, Any], add: Add) -> None:
    pairs = values.get("lora.pairs")
    if pairs != "shards":
        changed = [key for key, leaf in LEAVES.items() if key.startswith(_PREFIX) and key in values and values[key] != leaf.default]
        for key in changed if pairs is not None else ():
            add(key, f"is read with {_SHARDS} only, got {values[key]}", f"leave it out, or set {_SHARDS}")
        return
    private = values.get(_PREFIX + "private_rank", 0)
    for key in (_PREFIX + "equivalent_rank", "lora.r"):
        most = values.get(key, private)
        if isinstance(most, int) and private > most:  # a list of ranks has a problem already
            what = f"must be at most {key}, which is {most}, got {private}"
            add(_PREFIX + "private_rank", what, f"set it to {most} or less, or raise {key}: private shards are a part of both")
    rule = values.get("lora.gradient_rule")
    refused = (
        ("lora.gradient_rule", "none", f"{rule} is about rows of A and B that train by themselves, but", "which several pairs share"),
        ("fssdp.rematerialize", False, "frees replicas after each layer, but", "which all layers share and which lives a whole step"),
        ("fssdp.plan", "history", "gathers in each micro-step, but", "which lives a whole step"),
    )
    for key, only, what, why in refused:
        if not serves(key, values.get(key, only), only):
            add(key, f"{what} with {_SHARDS} pairs are parts of a pool, {why}", "leave it out, or use lora.pairs=plain")
    if values.get("lora.init_from") is not None:
        what = f"cannot be given with {_SHARDS}: A and B of an adapter do not say by which shards they were made"
        add("lora.init_from", what, "leave it out, or use lora.pairs=plain, which trains the adapter's own A and B on")
    if values.get("moe.router.input") == "given":
        what = "shards has one pool for all experts, but with moe.router.input=given each is an adapter that nothing else may influence"
        add("lora.pairs", what, "use lora.pairs=plain")
