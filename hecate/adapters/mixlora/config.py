"""The configuration of a `mixlora` adapter, and its translation to and from adapter_config.json."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from hecate.adapters.mixlora.names import OLD_MODULES, TARGET_MODULES
from hecate.config import RouterConfig
from hecate.config.files.paths import ADAPTER_CONFIG
from hecate.config.schema import LEAVES
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import lora_scale

_log = logging.getLogger(__name__)
CONFIG = ADAPTER_CONFIG
FORMAT_VERSION = 1
# The dropout written for other programs, which apply dropout at inference, too, and crash on 0.0.
_READERS_DROPOUT = 1e-9
_READ_KEYS = {
    "bias",
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "routing_strategy",
    "num_experts",
    "act_fn",
    "top_k",
    "hecate",
}
_HECATE_KEYS = {"format_version", "lora_dropout", "num_layers", "num_experts", "extra"}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The description of an adapter. Raises UserError, naming the field and its range, for a value out of range."""

    base_model_name_or_path: str
    r: int
    alpha: int
    dropout: float
    """The dropout that training used, from 0 to below 1. The key that other programs read says 1e-9 instead."""
    target_modules: tuple[str, ...]
    num_layers: int
    num_experts: int | tuple[int, ...]
    """The number of experts of every layer, or one number for each layer."""
    top_k: int
    act_fn: str
    """The activation of the gate, by transformers' name: "silu", "gelu_pytorch_tanh", ..."""
    use_rslora: bool = False
    """Whether the scale is alpha / sqrt(r) instead of alpha / r. Other programs read this key, so B is saved unchanged, bit for bit."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values to save with the adapter (family, router, aux-loss settings, ...); other programs do not read them."""

    def __post_init__(self) -> None:
        _check_text("base_model_name_or_path", self.base_model_name_or_path)
        _check_text("act_fn", self.act_fn)
        for name in ("r", "alpha", "num_layers", "top_k"):
            _check_whole(name, getattr(self, name))
        if type(self.dropout) is not float or not 0.0 <= self.dropout < 1.0:
            raise UserError(f"adapter: dropout must be a number from 0.0 to below 1.0, not {str(self.dropout)[:100]}")
        for module in self.target_modules:
            if module not in TARGET_MODULES:
                raise UserError(f"adapter: target_modules: {module[:100]!r} is not one of {', '.join(TARGET_MODULES)}")
        if not self.target_modules or len(set(self.target_modules)) != len(self.target_modules):
            raise UserError(f"adapter: target_modules must name each module once, not {str(list(self.target_modules))[:200]}")
        per_layer = self.experts_per_layer
        with_experts = [experts for experts in per_layer if experts != 0] or [0]
        for experts in with_experts:
            _check_whole("num_experts", experts)
        if len(per_layer) != self.num_layers:
            raise UserError(f"adapter: num_experts lists {len(per_layer)} layers, num_layers is {self.num_layers}")
        if self.top_k > min(with_experts):
            raise UserError(f"adapter: top_k must be from 1 to a layer's experts, {min(with_experts)}, not {self.top_k}")
        buffers = self.extra.get("router_buffers", [])
        if not isinstance(buffers, list) or not all(isinstance(name, str) and name.isidentifier() for name in buffers):
            raise UserError(f"adapter: router_buffers must be a list of names, not {str(buffers)[:100]}")

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Return the number of experts of each layer. 0: the layer keeps its plain FFN."""
        return self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,) * self.num_layers

    @property
    def router_buffers(self) -> tuple[str, ...]:
        """Return the names of what each router has beside its weight, one number per expert, such as a bias."""
        return tuple(self.extra.get("router_buffers", ()))

    @property
    def router(self) -> RouterConfig:
        """Return how the routers choose.

        Raises:
            UserError: they choose in a way that this version does not have.
        """
        return router_choices(self.extra.get("router", "softmax"))

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return lora_scale(self.alpha, self.r, rslora=self.use_rslora)


def router_choices(value: Any) -> RouterConfig:
    """Return how routers choose, from what an adapter's description says: the values of `moe.router`, or "softmax" for the default.

    Raises:
        UserError: they choose in a way that this version does not have.
    """
    if value == "softmax":  # as earlier versions, and other programs, mean it
        return RouterConfig()
    hints = get_type_hints(RouterConfig)
    ranges = {key: leaf.range for key, leaf in LEAVES.items() if leaf.range is not None}
    for key, given in value.items() if isinstance(value, dict) else [("router", value)]:
        allowed = get_args(hints.get(key, str)) or None
        unknown = key not in hints or (allowed is not None and given not in allowed) or (allowed is None and type(given) is not hints[key])
        if unknown or given not in ranges.get(f"moe.router.{key}", [given]):
            raise UserError(f"made with the router {str(value)[:200]}; this version has no {key[:100]} {str(given)[:100]}")
    return RouterConfig(**value)


def config_to_json(config: AdapterConfig) -> dict[str, Any]:
    """Return adapter_config.json as `mixlora` and `moe-peft` read it, with further values under the key "hecate".

    If layers differ in their number of experts, the list is under "hecate" and `num_experts` is its maximum. `mixlora` then refuses
    the adapter because tensors are missing; `moe-peft` adds experts to which no router sends tokens.
    """
    ours: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "lora_dropout": config.dropout,
        "num_layers": config.num_layers,
    }
    if isinstance(config.num_experts, tuple):
        ours["num_experts"] = list(config.num_experts)
    value: dict[str, Any] = {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": _READERS_DROPOUT,
        "target_modules": list(config.target_modules),
        "routing_strategy": "mixlora",
        "num_experts": max(config.experts_per_layer),
        "act_fn": config.act_fn,
        "top_k": config.top_k,
        "hecate": ours | {"extra": dict(config.extra)},
    }
    if config.use_rslora:
        value["use_rslora"] = True
    return value


def config_from_json(value: Any, num_layers_seen: int) -> AdapterConfig:
    """Return the configuration in adapter_config.json, written by hecate or by another program.

    Args:
        value: the JSON value of the file.
        num_layers_seen: the number of layers, if the file does not give it; only hecate writes it.

    Raises:
        UserError: a key is missing or wrong, or the adapter is of a kind that is not supported: DoRA, a bias, another routing
            strategy, or experts with settings of their own. Keys that are not used are only named in a warning.
    """
    if not isinstance(value, dict):
        raise UserError("not a JSON object")
    _expect(value, "peft_type", ("MIXLORA",))
    _expect(value, "routing_strategy", ("mixlora", "mixtral"))
    _expect(value, "task_type", ("CAUSAL_LM",))
    if value.get("bias", "none") != "none":
        raise UserError("bias: only 'none' is supported")
    if value.get("use_dora"):
        raise UserError("use_dora: adapters with DoRA magnitudes are not supported")
    if "expert_lora" in value:
        raise UserError("expert_lora: experts with settings other than the attention's are not supported")
    if unread := sorted(set(value) - _READ_KEYS - {"use_dora"}):
        _log.warning("%s: keys not used: %s", CONFIG, ", ".join(unread)[:500])
    ours = _hecate_part(value)
    num_experts = _key(value, "num_experts")
    if (per_layer := ours.get("num_experts")) is not None:
        if not isinstance(per_layer, list) or not all(type(n) is int for n in per_layer) or max(per_layer, default=0) != num_experts:
            raise UserError("hecate.num_experts must be a list of whole numbers whose maximum is num_experts")
        num_experts = tuple(per_layer)
    use_rslora = value.get("use_rslora", False)
    if type(use_rslora) is not bool:
        raise UserError(f"use_rslora must be true or false, not {str(use_rslora)[:100]}")
    return AdapterConfig(
        base_model_name_or_path=_key(value, "base_model_name_or_path"),
        r=_key(value, "r"),
        alpha=_key(value, "lora_alpha"),
        dropout=ours["lora_dropout"] if ours else _key(value, "lora_dropout"),
        target_modules=_target_modules(_key(value, "target_modules")),
        num_layers=ours.get("num_layers", num_layers_seen),
        num_experts=num_experts,
        top_k=_key(value, "top_k"),
        act_fn=_key(value, "act_fn"),
        use_rslora=use_rslora,
        extra=ours.get("extra", {}),
    )


def _hecate_part(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value of the key "hecate", or {} if another program wrote the adapter."""
    if "hecate" not in value:
        return {}
    ours = value["hecate"]
    if not isinstance(ours, dict) or type(ours.get("format_version")) is not int or ours["format_version"] < 1:
        raise UserError('"hecate" must be an object with a format_version')
    if ours["format_version"] > FORMAT_VERSION:
        raise UserError(f"format version {ours['format_version']} is newer than {FORMAT_VERSION}; use a newer hecate")
    if unknown := sorted(set(ours) - _HECATE_KEYS):
        raise UserError(f"hecate.{unknown[0][:100]}: unknown key")
    for name in ("lora_dropout", "num_layers", "extra"):
        _key(ours, name)
    if not isinstance(ours["extra"], dict):
        raise UserError("hecate.extra must be an object")
    return ours


def _target_modules(value: Any) -> tuple[str, ...]:
    """Return the target modules in hecate's order and names, from a list of names or, in older adapters, a mapping {name: bool}."""
    if isinstance(value, dict):
        if not all(type(chosen) is bool for chosen in value.values()):
            raise UserError("target_modules must say true or false for each name")
        value = [name for name, chosen in value.items() if chosen]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError("target_modules must be a list of names, or an object of name: true or false")
    listed: list[str] = value
    modules = [OLD_MODULES.get(name, name) for name in listed]
    return tuple(sorted(modules, key=lambda name: TARGET_MODULES.index(name) if name in TARGET_MODULES else -1))


def _key(value: dict[str, Any], name: str) -> Any:
    if name not in value:
        raise UserError(f"the key {name!r} is missing")
    return value[name]


def _expect(value: dict[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    if _key(value, name) not in allowed:
        raise UserError(f"{name} is {str(value[name])[:100]!r}; supported: {', '.join(allowed)}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise UserError(f"adapter: {name} must be text, not {str(value)[:100] or 'empty'}")


def _check_whole(name: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= 10**6:
        raise UserError(f"adapter: {name} must be a whole number from 1 to 1000000, not {str(value)[:100]}")
