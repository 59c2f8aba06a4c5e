"""The adapter of experts over linears: its adapter_config.json, and the names of its tensors, which are those of MoLA's authors.

Under the dotted name of each linear lie lora_A_0.weight, lora_B_0.weight, lora_A_1.weight and so on, one pair an expert, and
router.router.weight, with router.router.bias if the router has one. A linear without experts has lora_A.weight and lora_B.weight, as in
PEFT. The authors' own files do not say how many experts a layer has and which router chooses; here the description does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hecate.adapters.folder import peft_type_of, read_adapter, write_adapter_folder
from hecate.adapters.mixlora.config import router_choices
from hecate.config import RouterConfig
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import lora_scale

PEFT_TYPE = "MOLA"
_FORMAT_VERSION = 1
_LARGEST = 10**6
"""of numbers in a description"""


@dataclass(frozen=True, kw_only=True)
class LinearAdapterConfig:
    """The description of an adapter of experts over linears."""

    base_model_name_or_path: str
    r: int
    alpha: int
    use_rslora: bool
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
    extra: Mapping[str, Any] = field(default_factory=dict)
    """further JSON values to save with the adapter: a digest of what its pairs were made of, or the ranks of experts if they differ"""

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return lora_scale(self.alpha, self.r, rslora=self.use_rslora)

    @property
    def ranks(self) -> int | list[int]:
        """As `lora.r` has it: one rank, to which all pairs are padded, or that of each expert."""
        found: int | list[int] = self.extra.get("ranks", self.r)
        return found


def pair_names(path: str, expert: int | None) -> tuple[str, str]:
    """Return the names of A [r, inputs] and B [outputs, r] of an expert over the linear `path`; None: of its plain pair."""
    end = "" if expert is None else f"_{expert}"
    return f"base_model.model.{path}.lora_A{end}.weight", f"base_model.model.{path}.lora_B{end}.weight"


def router_name(path: str, part: str = "weight") -> str:
    """Return the name of a linear's router's weight, [experts, inputs], or of another parameter or buffer of the router."""
    return f"base_model.model.{path}.router.router.{part}"


def gated_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the dotted names of an adapter's linears whose experts are mixed by users."""
    return _paths(tensors, ".router.router.norm.weight")


def plain_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the dotted names of an adapter's linears that have one plain pair."""
    return _paths(tensors, ".lora_A.weight")


def user_width(tensors: Mapping[str, Tensor]) -> int | None:
    """Return how many numbers the vectors of users have that an adapter's gates take; None: it has no gates."""
    return next((len(tensors[router_name(path, "norm.weight")]) for path in gated_paths(tensors)), None)


def _paths(tensors: Mapping[str, Tensor], end: str) -> list[str]:
    return [name.removeprefix("base_model.model.").removesuffix(end) for name in tensors if name.endswith(end)]


def save_linear_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LinearAdapterConfig) -> None:
    """Write the adapter to the new folder `folder`.

    Raises:
        UserError: the folder exists, a tensor is not finite, or the disk fails.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"the adapter cannot be saved to {folder}: {name} is not finite")
    write_adapter_folder(folder, tensors, linear_config_to_json(config))


def linear_config_to_json(config: LinearAdapterConfig) -> dict[str, Any]:
    """Return adapter_config.json."""
    return {
        "peft_type": PEFT_TYPE,  # PEFT itself refuses it, and does not apply half of the adapter
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "number_experts": list(config.experts_per_layer),
        "top_k": config.top_k,
        "hecate": {
            "format_version": _FORMAT_VERSION,
            "router": asdict(config.router),
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "extra": dict(config.extra),
        },
    }


def load_linear_adapter(folder: Path) -> tuple[dict[str, Tensor], LinearAdapterConfig]:
    """Read a folder that `save_linear_adapter` has written. Tensors are on the CPU.

    Whether any is missing is checked against the model, in `hecate.adapters.linear_experts`.

    Raises:
        UserError: a file cannot be read, or a key is missing or wrong.
    """
    return read_adapter(folder, _config_from_json)


def is_linear_adapter(folder: Path) -> bool:
    """Return whether the folder's configuration is of this format. Raises UserError as `peft_type_of`."""
    return peft_type_of(folder) == PEFT_TYPE


def _config_from_json(value: Any) -> LinearAdapterConfig:
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
        if not 1 <= value[name] <= _LARGEST:
            raise UserError(f"{name} must be from 1 to {_LARGEST}, not {str(value[name])[:100]}")
    for name, item in (("target_modules", str), ("number_experts", int)):
        if not isinstance(value.get(name), list) or not value[name] or not all(type(one) is item for one in value[name]):
            raise UserError(f"{name} must be a list of {'names' if item is str else 'whole numbers, one a layer'}")
    if not all(0 <= one <= _LARGEST for one in value["number_experts"]):
        raise UserError(f"number_experts must be from 0 to {_LARGEST}, not {str(value['number_experts'])[:100]}")
    if not isinstance(ours.get("router"), str | dict) or not isinstance(ours.get("router_aux_loss_coef"), int | float):
        raise UserError("hecate.router and hecate.router_aux_loss_coef must be given")
    if not isinstance(ours.get("extra", {}), dict):
        raise UserError("hecate.extra must be an object")
    return LinearAdapterConfig(
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
