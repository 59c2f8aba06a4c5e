"""What a `mixlora` adapter is: its adapter_config.json, and the tensors that it must have."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hecate.adapters.card import GENERATE, Loading
from hecate.adapters.description import LARGEST, MixtureDescription, router_choices
from hecate.adapters.folder import CONFIG, read_adapter_config, read_weights, weights_path
from hecate.adapters.mixlora.names import (
    ATTENTION_MODULES,
    FFN_MODULES,
    OLD_MODULES,
    TARGET_MODULES,
    attention_tensor_name,
    expert_tensor_name,
    layer_in,
    modern_name,
    router_part_name,
    router_tensor_name,
)
from hecate.adapters.places import Place
from hecate.config import RouterConfig
from hecate.errors import UserError

_log = logging.getLogger(__name__)
PEFT_TYPE = "MIXLORA"
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
_NAME_OF_A = re.compile(r"mixlora\.(.+)\.lora_A\.weight")


@dataclass(frozen=True, kw_only=True)
class MixLoraDescription(MixtureDescription):
    """The description of an adapter. Raises UserError, naming the field and its range, for a value out of range."""

    what = "a mixture of experts over a dense model's FFNs, whose router chooses for each token"
    loading = Loading(
        "hecate",
        ("lora", "mixlora", "mixture-of-experts"),
        f"With hecate:\n\n{GENERATE}\n\nFor the `mixlora` and `moe-peft` libraries: `hecate export FOLDER --to mixlora -o OUT`. "
        "For servers, over Llama and Mistral: `--to mixtral`.",
    )
    dropout: float
    """The dropout that training used, from 0 to below 1. The key that other programs read says 1e-9 instead."""
    target_modules: tuple[str, ...]
    num_layers: int
    num_experts: int | tuple[int, ...]
    """The number of experts of every layer, or one number for each layer."""
    top_k: int
    act_fn: str
    """The activation of the gate, by transformers' name: "silu", "gelu_pytorch_tanh", ..."""

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

    def to_json(self) -> dict[str, Any]:
        """Return adapter_config.json as `mixlora` and `moe-peft` read it, with further values under the key "hecate".

        If layers differ in their number of experts, the list is under "hecate" and `num_experts` is its maximum. `mixlora` then refuses
        the adapter because tensors are missing; `moe-peft` adds experts to which no router sends tokens.
        """
        ours: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "lora_dropout": self.dropout,
            "num_layers": self.num_layers,
        }
        if isinstance(self.num_experts, tuple):
            ours["num_experts"] = list(self.num_experts)
        not_read = ("inference_mode", "use_rslora")
        begun = {"bias": "none"} | {key: one for key, one in self.as_lora(PEFT_TYPE, _READERS_DROPOUT).items() if key not in not_read}
        value: dict[str, Any] = {
            **begun,
            "target_modules": list(self.target_modules),
            "routing_strategy": "mixlora",
            "num_experts": max(self.experts_per_layer),
            "act_fn": self.act_fn,
            "top_k": self.top_k,
            "hecate": ours | {"extra": dict(self.extra)},
        }
        if self.use_rslora:
            value["use_rslora"] = True
        return value

    def checked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `checked_tensors`."""
        return checked_tensors(tensors, self)

    def places(self, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
        """Modules have names such as layers.3.mlp.gate_proj.experts.7."""
        return {module: self.place(module) for name in tensors if (match := _NAME_OF_A.fullmatch(name)) for module in match.groups()}

    def place(self, module: str) -> Place:
        return Place(f"mixlora.{module}.lora_A.weight", f"mixlora.{module}.lora_B.weight")

    def with_experts(self, counts: tuple[int, ...]) -> Self:
        top_k = min(self.top_k, *(count for count in counts if count))
        return replace(self, num_experts=counts if isinstance(self.num_experts, tuple) else max(counts), top_k=top_k)

    def router_prefix(self, unit: str) -> str:
        return f"mixlora.{unit}.mlp.moe_gate."


def other_than_mixtrals(config: MixLoraDescription) -> str:
    """Return what of an adapter's routing is not Mixtral's: the k largest of a softmax, renormalised, and nothing else. Empty: nothing."""
    choices, usual = config.router, RouterConfig()
    # How a router was trained does not matter, and a dense one chooses all, which is a choice of the k largest, too.
    dense = choices.dense and config.top_k != max(config.experts_per_layer)
    asked = replace(choices, bias_rate=usual.bias_rate, balance=usual.balance, dense=dense)
    different = {key: value for key, value in vars(asked).items() if value != getattr(usual, key)}
    return ", ".join(f"moe.router.{key}: {value}" for key, value in different.items())


def mixlora_from_json(value: Any, num_layers_seen: int) -> MixLoraDescription:
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
    _expect(value, "peft_type", (PEFT_TYPE,))
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
    return MixLoraDescription(
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
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise UserError(f"adapter: {name} must be a whole number from 1 to 1000000, not {str(value)[:100]}")


def expected_shapes(config: MixLoraDescription) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    """Yield the name and shape of every tensor of the adapter, layer by layer.

    A size that the configuration does not give is a text, and equal texts mean equal sizes: "hidden" is the same in all layers; "ffn"
    and the inputs and outputs of attention are the same within a layer.
    """
    for layer, num_experts in enumerate(config.experts_per_layer):
        for module in ATTENTION_MODULES:
            if module in config.target_modules:
                inner = f"{module} of layer {layer}"
                out, into = ("hidden", inner) if module == "o_proj" else (inner, "hidden")
                yield attention_tensor_name(layer, module, "A"), (config.r, into)
                yield attention_tensor_name(layer, module, "B"), (out, config.r)
        if num_experts > 0:
            yield router_tensor_name(layer), (num_experts, "hidden")
            for buffer in config.router_buffers:
                yield router_part_name(layer, buffer), (num_experts,)
        ffn = f"ffn of layer {layer}"
        for module in FFN_MODULES:
            if module in config.target_modules:
                out, into = ("hidden", ffn) if module == "down_proj" else (ffn, "hidden")
                for expert in range(num_experts):
                    yield expert_tensor_name(layer, module, expert, "A"), (config.r, into)
                    yield expert_tensor_name(layer, module, expert, "B"), (out, config.r)


def checked_tensors(tensors: Mapping[str, Tensor], config: MixLoraDescription) -> dict[str, Tensor]:
    """Return the adapter's tensors as detached fp32 tensors on the CPU, in the order of `expected_shapes`.

    fp16 and bf16 become fp32 exactly; fp64 is rounded. Raises UserError, naming the tensor, if one is missing, unknown, of the wrong
    shape, not of floating point, or holds NaN or infinity.
    """
    expected: dict[str, tuple[int | str, ...]] = {}
    # The loop stops at the first missing tensor, because a forged configuration may list any number.
    for name, shape in expected_shapes(config):
        if name not in tensors:
            raise UserError(f"tensor {name} is missing; the adapter has {len(tensors)} tensors")
        expected[name] = shape
    for name in tensors:
        if name not in expected:
            raise UserError(f"tensor {name[:200]} does not belong to an adapter of this configuration")
    sizes: dict[str, tuple[int, str]] = {}
    result = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(f"tensor {name} is {tensor.dtype}, not a dense tensor of floating point")
        if tensor.dim() != len(shape) or 0 in tensor.shape:
            raise UserError(f"tensor {name} has the shape {list(tensor.shape)}, not that of a {'matrix' if len(shape) == 2 else 'vector'}")
        for found, size in zip(tensor.shape, shape, strict=True):
            wanted, source = (size, CONFIG) if isinstance(size, int) else sizes.setdefault(size, (found, name))
            if found != wanted:
                raise UserError(f"tensor {name} has the shape {list(tensor.shape)}; {found} is {wanted} in {source}")
        converted = tensor.detach().to(device="cpu", dtype=torch.float32)
        if not torch.isfinite(converted).all():
            raise UserError(f"tensor {name} holds NaN or infinity in fp32")
        result[name] = converted
    return result


def load_mixlora(folder: Path) -> tuple[dict[str, Tensor], MixLoraDescription]:
    """Read an adapter folder that hecate, `mixlora` or `moe-peft` has written, with current tensor names or the older `mixtral` ones.

    Returns fp32 tensors on the CPU under current names, and the configuration. The file adapter_model.safetensors is read if it
    exists, otherwise adapter_model.bin. Raises UserError, naming the file and the tensor or key, for anything missing, unknown or of
    the wrong shape.
    """
    config_path, value = folder / CONFIG, read_adapter_config(folder)
    path = weights_path(folder)
    found = read_weights(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if modern_name(name) in tensors:
            raise UserError(f"{path}: tensor {modern_name(name)} is there twice, under its older name too")
        tensors[modern_name(name)] = tensor
    num_layers = 1 + max((layer for name in tensors if (layer := layer_in(name)) is not None), default=0)
    try:
        config = mixlora_from_json(value, num_layers)
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from error
    try:
        return checked_tensors(tensors, config), config
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
