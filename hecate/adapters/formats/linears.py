"""Experts over linears: the adapter's adapter_config.json, and the names of its tensors, which are those of MoLA's authors.

Under the dotted name of each linear lie lora_A_0.weight, lora_B_0.weight, lora_A_1.weight and so on, one pair an expert, and
router.router.weight, with router.router.bias if the router has one. A linear without experts has lora_A.weight and lora_B.weight, as in
PEFT. The authors' own files do not say how many experts a layer has and which router chooses; here the description does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.card import GENERATE, Loading, how_trained
from hecate.adapters.description import LARGEST, Adapter, MixtureDescription, router_choices
from hecate.adapters.folder import CONFIG, described_template, read_adapter_config, read_weights
from hecate.adapters.model_tensors import TensorNames, linear_path, put_into
from hecate.adapters.places import Place
from hecate.config import Config, RouterConfig, named_model
from hecate.errors import UserError
from hecate.model.base import BaseModel
from hecate.model.gated_ffn import decoder_layers
from hecate.model.linears import target_linears
from hecate.model.moe_model import MoeModel

_PEFT_TYPE = "MOLA"
_PREFIX = "base_model.model"
_FORMAT_VERSION = 1
_NAME_OF_A = re.compile(rf"{re.escape(_PREFIX)}\.(.+)\.lora_A(?:_(\d+))?\.weight")


@dataclass(frozen=True, kw_only=True)
class LinearsDescription(MixtureDescription):
    """The description of an adapter of experts over linears."""

    what = "a mixture of experts over single linears, whose routers choose for each token or user"
    loading = Loading("hecate", ("lora", "mola", "mixture-of-experts"), f"With hecate, and no other program:\n\n{GENERATE}")
    target_modules: tuple[str, ...]
    """the last names of the adapted linears"""
    experts_per_layer: tuple[int, ...]
    """of each linear, by decoder layer; 0: one plain pair"""
    top_k: int
    dropout: float
    """that training used"""
    router_aux_loss_coef: float
    router: RouterConfig = field(default_factory=RouterConfig)
    """how the routers choose"""

    @property
    def why_no_form(self) -> str:
        if self.router.by_user:
            return "for each user it is another LoRA: give --user ID and --features FILE.npz, and that of the user is written for PEFT"
        return f"which of its pairs are at work depends on the token, so that no LoRA equals it; {super().why_no_form}"

    def to_json(self) -> dict[str, Any]:
        return {
            **self.as_lora(_PEFT_TYPE, self.dropout),  # PEFT itself refuses this type, and does not apply half of the adapter
            "target_modules": list(self.target_modules),
            "number_experts": list(self.experts_per_layer),
            "top_k": self.top_k,
            "hecate": {
                "format_version": _FORMAT_VERSION,
                "router": asdict(self.router),
                "router_aux_loss_coef": self.router_aux_loss_coef,
                "extra": dict(self.extra),
            },
        }

    def places(self, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
        """Modules have names such as model.layers.3.self_attn.q_proj.experts.7, and without the end where there is one pair."""
        found = [match.groups() for name in tensors if (match := _NAME_OF_A.fullmatch(name))]
        modules = [path if expert is None else f"{path}.experts.{expert}" for path, expert in found]
        return {module: self.place(module) for module in modules}

    def place(self, module: str) -> Place:
        path, _, number = module.rpartition(".")
        return Place(*(pair_names(path.removesuffix(".experts"), int(number)) if number.isdigit() else pair_names(module, None)))

    def require_terms(self, folder: Path) -> None:
        if self.router.by_user:
            raise UserError(
                f"{folder}: its experts are mixed by users (RecLoRA), and their sum depends on the user\n"
                "  write the LoRA of one user with hecate export --user, and merge that"
            )
        if self.r == 1 and self.router.score == "sigmoid":
            raise UserError(
                f"{folder}: each of its experts is one rank with a router's row of its own (SMoRA), and a merged term has none\n"
                "  merge adapters whose experts have a higher rank"
            )

    def user_width(self, tensors: Mapping[str, Tensor]) -> int | None:
        return next((len(tensors[router_name(path, "norm.weight")]) for path in gated_paths(tensors)), None)

    def with_experts(self, counts: tuple[int, ...]) -> Self:
        return replace(self, experts_per_layer=counts, top_k=min(self.top_k, *(count for count in counts if count)))

    def router_prefix(self, unit: str) -> str:
        return router_name(unit, "")


class Linears(AdapterFormat):
    """Experts over linears, with routers of their own."""

    name = "linears"
    what = LinearsDescription.what
    peft_type = _PEFT_TYPE

    def read(self, folder: Path) -> Adapter:
        value = read_adapter_config(folder)
        try:
            description = _from_json(value)
        except UserError as error:
            raise UserError(f"{folder / CONFIG}: {error}") from error
        return Adapter(folder, read_weights(folder), description)

    def describe(self, config: Config, base: BaseModel) -> LinearsDescription:
        """Raises UserError: a target module is no linear of the model, or there are not as many numbers of experts as it has layers."""
        target_linears(base.linears, config.lora.target_modules, type(base.model).__name__)
        experts_per_layer = config.moe.experts_per_layer(len(decoder_layers(base.model)[1]))
        return LinearsDescription(
            base_model_name_or_path=named_model(config.model.name_or_path),
            r=config.lora.rank,
            alpha=config.lora.stored_alpha,
            use_rslora=config.lora.use_rslora,
            target_modules=config.lora.target_modules,
            experts_per_layer=experts_per_layer,
            top_k=min(config.moe.experts_per_token, *(count for count in experts_per_layer if count)),
            dropout=config.lora.dropout,
            router_aux_loss_coef=config.moe.router_aux_loss_coef,
            router=config.moe.router,
            extra={
                "training": how_trained(config),
                **({"ranks": list(config.lora.r)} if isinstance(config.lora.r, tuple) else {}),
                **described_template(base.chat_template),
            },
        )

    def names(self, base: BaseModel, _moe: MoeModel) -> TensorNames:
        def path(layer: int, module: str) -> str:
            return linear_path(base.model, layer, module)

        return TensorNames(
            lambda unit, _, expert: Place(*pair_names(path(unit.layer, unit.place), expert)),
            lambda layer, module: pair_names(path(layer, module), None),
            lambda unit, part: router_name(path(unit.layer, unit.place), part),
        )

    def load(self, adapter: Adapter, base: BaseModel, moe: MoeModel) -> None:
        names = self.names(base, moe)
        # Earlier versions wrote a router for a single pair, too.
        unread = {names.router(unit, "weight") for unit, layer in moe.layers.items() if not layer.trained_router}
        put_into(moe, names, {name: tensor for name, tensor in adapter.tensors.items() if name not in unread}, adapter.folder)


FORMAT = Linears()


def pair_names(path: str, expert: int | None) -> tuple[str, str]:
    """Return the names of A [r, inputs] and B [outputs, r] of an expert over the linear `path`; None: of its plain pair."""
    end = "" if expert is None else f"_{expert}"
    return f"{_PREFIX}.{path}.lora_A{end}.weight", f"{_PREFIX}.{path}.lora_B{end}.weight"


def router_name(path: str, part: str = "weight") -> str:
    """Return the name of a linear's router's weight, [experts, inputs], or of another parameter or buffer of the router."""
    return f"{_PREFIX}.{path}.router.router.{part}"


def gated_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the dotted names of an adapter's linears whose experts are mixed by users."""
    return _paths(tensors, ".router.router.norm.weight")


def plain_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the dotted names of an adapter's linears that have one plain pair."""
    return _paths(tensors, ".lora_A.weight")


def _paths(tensors: Mapping[str, Tensor], end: str) -> list[str]:
    return [name.removeprefix(f"{_PREFIX}.").removesuffix(end) for name in tensors if name.endswith(end)]


def _from_json(value: Any) -> LinearsDescription:
    if not isinstance(value, dict):
        raise UserError("not a JSON object")
    ours = value.get("hecate")
    if not isinstance(ours, dict) or ours.get("format_version") != _FORMAT_VERSION:
        raise UserError(
            f"hecate.format_version must be {_FORMAT_VERSION}\n  only adapters that hecate has written say all that is needed to read them"
        )
    kinds: dict[str, type | tuple[type, ...]] = {
        "base_model_name_or_path": str,
        "r": int,
        "lora_alpha": int,
        "lora_dropout": (int, float),
        "use_rslora": bool,
        "top_k": int,
    }
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind) or (kind is not bool and isinstance(value[name], bool)):
            raise UserError(f"{name} is missing or of another type: {str(value.get(name))[:100]}")
    for name in ("r", "lora_alpha", "top_k"):
        if not 1 <= value[name] <= LARGEST:
            raise UserError(f"{name} must be from 1 to {LARGEST}, not {str(value[name])[:100]}")
    for name, item in (("target_modules", str), ("number_experts", int)):
        if not isinstance(value.get(name), list) or not value[name] or not all(type(one) is item for one in value[name]):
            raise UserError(f"{name} must be a list of {'names' if item is str else 'whole numbers, one a layer'}")
    if not all(0 <= one <= LARGEST for one in value["number_experts"]):
        raise UserError(f"number_experts must be from 0 to {LARGEST}, not {str(value['number_experts'])[:100]}")
    if not isinstance(ours.get("router"), str | dict) or not isinstance(ours.get("router_aux_loss_coef"), int | float):
        raise UserError("hecate.router and hecate.router_aux_loss_coef must be given")
    if not isinstance(ours.get("extra", {}), dict):
        raise UserError("hecate.extra must be an object")
    return LinearsDescription(
        base_model_name_or_path=value["base_model_name_or_path"],
        r=value["r"],
        alpha=value["lora_alpha"],
        use_rslora=value["use_rslora"],
        target_modules=tuple(value["target_modules"]),
        experts_per_layer=tuple(value["number_experts"]),
        top_k=value["top_k"],
        dropout=_float(value["lora_dropout"]),
        router_aux_loss_coef=_float(ours["router_aux_loss_coef"]),
        router=router_choices(ours["router"]),
        extra=ours.get("extra", {}),
    )


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise UserError(f"{str(value)[:30]}... is not a number that can be computed with") from error
