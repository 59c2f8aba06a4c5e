"""What an adapter says of itself, whatever its format: the fields that all have, and what is to be asked of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args, get_type_hints

from torch import Tensor

from hecate.adapters.card import Loading
from hecate.adapters.places import Place
from hecate.config import RouterConfig, named_model
from hecate.config.schema import LEAVES
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import lora_scale

LARGEST = 10**6
"""of numbers in a description"""


@dataclass(frozen=True, kw_only=True)
class Description(ABC):
    """The description of an adapter."""

    what: ClassVar[str]
    """what an adapter with such a description is, for messages"""
    loading: ClassVar[Loading]
    """how a folder is loaded as a run leaves it, for its card"""
    base_model_name_or_path: str
    r: int
    alpha: int
    use_rslora: bool = False
    """whether the scale is alpha / sqrt(r) instead of alpha / r; other programs read this key, too, so B is saved unchanged, bit for bit"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """further JSON values to save with the adapter, which other programs do not read"""

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return lora_scale(self.alpha, self.r, rslora=self.use_rslora)

    @property
    def ranks(self) -> int | list[int]:
        """As `lora.r` has it: one rank, to which all pairs are padded, or that of each expert."""
        found: int | list[int] = self.extra.get("ranks", self.r)
        return found

    @property
    def why_no_form(self) -> str:
        """Why `hecate export` writes it in no form, and what to do, where no format holds it."""
        return "hecate generate and hecate eval compute it"

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return adapter_config.json."""

    def as_lora(self, peft_type: str, dropout: float) -> dict[str, Any]:
        """Return what PEFT reads of any LoRA: with what adapter_config.json begins."""
        return {
            "peft_type": peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": dropout,
            "use_rslora": self.use_rslora,
        }

    @abstractmethod
    def places(self, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
        """Return the place of each module that an adapter has a pair for, by the module's name, in the order of the tensors."""

    @abstractmethod
    def place(self, module: str) -> Place:
        """Return where the pair of a module is, of one that `places` knows."""

    def checked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the adapter's tensors as they are written. Raises UserError: one is not finite, or not as the format has it."""
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{name} is not finite")
        return tensors

    def require_terms(self, folder: Path) -> None:  # noqa: B027 - most adapters are sums of terms
        """Raises UserError: no term can be taken out of such an adapter without what chooses it."""

    def on(self, base: str | None) -> Self:
        """The same over the base model of another name or path; None: the one that it names."""
        return self if base is None else replace(self, base_model_name_or_path=named_model(base))


class MixtureDescription(Description):
    """The description of an adapter whose experts have routers of their own."""

    top_k: int
    if TYPE_CHECKING:  # fields of one, and properties of another

        @property
        def experts_per_layer(self) -> tuple[int, ...]:
            """The number of experts of the units of each decoder layer."""

        @property
        def router(self) -> RouterConfig:
            """How the routers choose. Raises UserError: in a way that this version does not have."""

        @property
        def target_modules(self) -> tuple[str, ...]:
            """The last names of the linears with pairs."""

    def user_width(self, _tensors: Mapping[str, Tensor]) -> int | None:
        """Return how many numbers the vectors of users have by which an adapter's routers decide; None: they decide by something else."""
        return None

    @abstractmethod
    def with_experts(self, counts: tuple[int, ...]) -> Self:
        """The same with fewer experts. `top_k` is at most the fewest.

        Args:
            counts: as `experts_per_layer`.
        """

    @abstractmethod
    def router_prefix(self, unit: str) -> str:
        """How the names of the tensors of a unit's router begin.

        Args:
            unit: a decoder layer or a linear, as the names of modules begin that share a router.
        """


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read from its folder, whatever format that has."""

    folder: Path
    tensors: Mapping[str, Tensor]
    description: Description

    def on(self, base: str | None) -> Adapter:
        """The same adapter over the base model of another name or path; None: the one that it names."""
        return replace(self, description=self.description.on(base))


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
