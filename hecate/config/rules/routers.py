"""Check which choices of a router go together, and with what else of a configuration."""

from collections.abc import Mapping
from typing import Any

from hecate.config.expert_keys import DEFAULT_EXPERTS, DEFAULT_TOP_K
from hecate.config.problems import Add, shorten
from hecate.config.rules.users import OWN_KEYS, check_features, check_user, most_experts
from hecate.config.schema import LEAVES
from hecate.parallel.values.expert_kinds import KINDS, PROJECTIONS, ExpertKind, kind_of

_PREFIX = "moe.router."


def check_router(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of the keys of `moe.router`, given the typed values of all dotted keys. Absent keys have a problem already."""
    changed = {
        key: values[key] for key, leaf in LEAVES.items() if key.startswith(_PREFIX) and key in values and values[key] != leaf.default
    }
    kind, by_user = KINDS.get(values.get("moe.family", "")), values.get(_PREFIX + "input") == "user"
    check_features(values, add, by_user=by_user)
    if kind is not None and not _takes_choices(kind):
        families = " or ".join(kind.name for kind in KINDS.values() if _takes_choices(kind) and not kind.over_linears)
        for key in changed:
            add(key, f"applies to moe.family={families} only, but the family is {kind.name}", "leave it out")
        return
    if by_user:
        check_user(values, changed, add)
        return
    for key in [key for key in OWN_KEYS if key in changed and key != _PREFIX + "input"]:
        del changed[key]
        add(key, "applies to moe.router.input=user only", "leave it out")
    if values.get(_PREFIX + "input") == "given":
        _check_given(values, changed, add)
        return
    if values.get("moe.unit") == "linear" and most_experts(values) <= 1:
        for key in changed:
            add(key, "has no effect with one expert for each linear, where nothing is chosen", "leave it out, or raise moe.num_experts")
        return
    _check_bias(values, changed, add)
    _check_choice(values, add)
    _check_weights(values, add)


def _takes_choices(kind: ExpertKind) -> bool:
    """Whether the routers of such experts are new ones, and stay in a format of this program's own."""
    return kind.has_pairs and not kind.of_moe_base


def _check_given(values: Mapping[str, Any], changed: Mapping[str, Any], add: Add) -> None:
    given = f"{_PREFIX}input=given"
    for key in changed:
        if key != _PREFIX + "input":
            add(key, f"has no effect with {given}, where the sample's source is the choice", "leave it out")
    if values.get("moe.router_aux_loss_coef"):
        what = f"must be 0 with {given}, where nothing can balance the loads, got {values['moe.router_aux_loss_coef']}"
        add("moe.router_aux_loss_coef", what, "set moe.router_aux_loss_coef=0")
    if values.get("skip_step_sigma_factor") is not None:
        what = f"must be null with {given}, where no adapter depends on another's gradients, got {values['skip_step_sigma_factor']}"
        add("skip_step_sigma_factor", what, "leave it out")
    if "moe.top_k" in values and values["moe.top_k"] != 1:
        add("moe.top_k", f"must be 1 with {given}: a sample has one source, got {values['moe.top_k'] or DEFAULT_TOP_K}", "set moe.top_k=1")
    sources = values.get("data.train")
    if values.get("moe.allocation") is not None:
        what = f"cannot be given with {given}: every layer has one expert for each item of data.train"
        add("moe.allocation", what, "give moe.num_experts in its place")
    elif sources is not None and "moe.num_experts" in values and values["moe.num_experts"] != len(sources):
        got = DEFAULT_EXPERTS if values["moe.num_experts"] is None else values["moe.num_experts"]
        shown = list(got) if isinstance(got, tuple) else got
        what = f"must be {len(sources)} with {given}, one expert for each item of data.train, got {shown}"
        add("moe.num_experts", what, f"set moe.num_experts={len(sources)}")
    names = [source.name for source in sources or ()]
    for i, source in enumerate(values.get("data.eval", ()) if names else ()):
        if source.name not in names:
            what = f"{shorten(source.name)} has no expert: with {given} it is that of the item of data.train with the same name"
            add(f"data.eval[{i}].name", what, f"give it one of the names {shorten(', '.join(names))}")
    attention = [name for name in values.get("lora.target_modules") or () if name not in PROJECTIONS]
    if attention and values.get("moe.unit", "ffn") == "ffn":
        what = f"names {', '.join(map(shorten, attention))}, whose adapter all experts would share; with {given} they must not"
        add("lora.target_modules", what, f"leave it at modules of the FFN, {', '.join(PROJECTIONS)}, or set moe.unit=linear")


def _check_bias(values: Mapping[str, Any], changed: Mapping[str, Any], add: Add) -> None:
    bias = values.get(_PREFIX + "bias")
    if bias is None:
        return
    if bias != "balancing":
        for name in ("bias_rate", "bias_in_weights"):
            if _PREFIX + name in changed:
                add(_PREFIX + name, f"applies to moe.router.bias=balancing only, but the bias is {bias}", "leave it out")
        return
    coefficient = values.get("moe.router_aux_loss_coef")
    if coefficient:
        what = f"must be 0 with moe.router.bias=balancing, whose bias evens out the loads instead of a loss, got {coefficient}"
        add("moe.router_aux_loss_coef", what, "set moe.router_aux_loss_coef=0, or moe.router.bias=none")
    if values.get(_PREFIX + "dense"):
        what = "balancing has no effect with moe.router.dense, where every token goes to all experts, so that all loads are equal"
        add(_PREFIX + "bias", what, "leave moe.router.dense out, or use learned or none")
    if _PREFIX + "balance" in changed:
        add(_PREFIX + "balance", "has no effect with moe.router.bias=balancing, which has no load-balancing loss", "leave it out")


def _check_choice(values: Mapping[str, Any], add: Add) -> None:
    top_k = values.get("moe.top_k")
    if values.get(_PREFIX + "dense") and top_k not in (None, most_experts(values)):  # which a run's own config.yaml says
        add("moe.top_k", f"is {top_k}, but with moe.router.dense every token goes to all experts", "leave moe.top_k out, or dense")


def _check_weights(values: Mapping[str, Any], add: Add) -> None:
    key = _PREFIX + "weights"
    weights, dense = values.get(key), values.get(_PREFIX + "dense")
    if weights == "one" and dense:
        add(key, "one needs moe.top_k=1, but with moe.router.dense every token goes to all experts", "use renormalised")
    elif weights == "one" and "moe.top_k" in values:
        top_k = values["moe.top_k"] or DEFAULT_TOP_K
        if top_k != 1:
            what = f"one needs moe.top_k=1, got {top_k}: the sum of several results would be that many times too large"
            add(key, what, "set moe.top_k=1, or moe.router.weights=renormalised")
    kind = kind_of(values.get("moe.family", ""), values.get("moe.unit", "ffn"))
    sums_to_one = dense and values.get(_PREFIX + "score") == "softmax"
    if weights == "gate" and kind is not None and kind.shares_ffn and not sums_to_one:
        what = (
            f"gate does not fit moe.family={kind.name}: an expert's result contains that of the FFN, which would be multiplied by the sum "
            "of the weights, so that training would begin with another model than the base model"
        )
        add(key, what, "use renormalised; gate is right where all weights sum to 1: with score=softmax and dense=true")
