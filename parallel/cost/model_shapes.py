"""Describe a model by a few numbers, from which the bytes and FLOPs of its layers follow without building it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.io.plain_files import read_plain_text
from hecate.io.strict_yaml import MOST_BYTES, YamlError, parse_yaml
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.cost.expert_cost import STATE_NUMBERS, NumberBytes, expert_layer_cost, ffn_place
from hecate.parallel.values.expert_kinds import KINDS, ExpertKind, Family

_LARGEST = 10**9
"""the largest size of a model, since sizes are multiplied with one another"""
_MASTER_BYTES = 4
"""master parameters, moments and adapters are float32"""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a transformer in which every layer has attention and a mixture of experts.

    Raises:
        UserError: a value is out of range, or missing or superfluous for the kind.
    """

    name: str
    kind: Family
    """the kind of experts. full: fully trained. mixlora: LoRA pairs over one frozen FFN that a layer's experts share. moe_lora: LoRA
    pairs over frozen experts, each with its own FFN"""
    hidden: int
    ffn: int
    """the inner size of one expert's FFN, or of the shared one"""
    layers: int
    seq: int
    """the tokens of a sequence"""
    experts: int
    top_k: int
    matrices: int = 3
    """the number of matrices of an FFN: 3 with a gate, 2 without"""
    rank: int | None = None
    """the rank of the LoRA pairs"""
    dtype_bytes: int = 2
    """the bytes of a weight and of an activation"""
    query_width: int | None = None
    """the number of heads times their size; None: `hidden`"""
    key_value_width: int | None = None
    """the number of key heads times their size; None: `query_width`"""
    causal: bool = True
    """whether half of the attention is masked and not computed"""

    def __post_init__(self) -> None:
        known = sorted(kind.name for kind in KINDS.values() if not kind.over_linears)  # the units of a layer have one cost here
        if not isinstance(self.kind, str) or self.kind not in known:
            raise UserError(f"{self.name}: kind must be one of {', '.join(known)}, got {repr(self.kind)[:60]}")
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.default is None and value is None
            if "int" in str(field.type) and not optional and (type(value) is not int or value < 1):
                raise UserError(f"{self.name}: {field.name} must be an integer >= 1, got {repr(value)[:60]}")
            if type(value) is int and value > _LARGEST:
                raise UserError(f"{self.name}: {field.name} must be at most {_LARGEST}, got {str(value)[:60]}")
        if type(self.causal) is not bool:
            raise UserError(f"{self.name}: causal must be true or false, got {repr(self.causal)[:60]}")
        if self.matrices not in (2, 3):
            raise UserError(f"{self.name}: matrices must be 2 (no gate) or 3 (gated), got {self.matrices}")
        if self.top_k > self.experts:
            raise UserError(f"{self.name}: top_k is {self.top_k}, but there are {self.experts} experts")
        if (self.rank is not None) != self.of_kind.has_pairs:
            raise UserError(f"{self.name}: {'kind full has no rank' if self.rank else f'kind {self.kind} needs a rank'}")

    @property
    def of_kind(self) -> ExpertKind:
        """The facts about the kind of experts."""
        return KINDS[self.kind]

    @property
    def ffn_parameters(self) -> int:
        """The parameters of one FFN: an expert's own, or the one that all share."""
        return self.matrices * self.hidden * self.ffn

    @property
    def pair_parameters(self) -> int:
        """The parameters of one expert's LoRA pairs: A and B of each matrix. Where gate and up are joined, they have one A together."""
        if self.rank is None:
            return 0
        joined = self.of_kind.joins_gate_and_up and self.matrices == 3
        return self.rank * (self.matrices * (self.hidden + self.ffn) - self.hidden * joined)

    @property
    def attention_parameters(self) -> int:
        """The parameters of one layer's attention projections."""
        query = self.hidden if self.query_width is None else self.query_width
        key_value = query if self.key_value_width is None else self.key_value_width
        return 2 * self.hidden * (query + key_value)

    def replicated_bytes(self) -> float:
        """The bytes that every rank holds of all layers, apart from experts.

        With LoRA experts that is the frozen attention and the FFN that the experts share; with full experts it is the attention with
        gradients, float32 master parameters and moments.
        """
        if not self.of_kind.has_pairs:
            return float(self.layers * self.attention_parameters * (2 * self.dtype_bytes + STATE_NUMBERS * _MASTER_BYTES))
        shared = self.ffn_parameters if self.of_kind.shares_ffn else 0
        return float(self.layers * (self.attention_parameters + shared) * self.dtype_bytes)

    def attention_flops(self, tokens: float) -> float:
        """Return the forward FLOPs of one layer's attention over `tokens` tokens in whole sequences.

        These are the projections, the scores, and the products of scores and values.
        """
        return tokens * (2.0 * self.attention_parameters + self._score_flops)

    @property
    def attention_backward(self) -> float:
        """Backward over forward FLOPs of the attention: as many for frozen projections, twice as many for trained ones and for scores."""
        projections = 2.0 * self.attention_parameters
        frozen = projections if self.of_kind.has_pairs else 0.0
        return 2.0 - frozen / (projections + self._score_flops)

    @property
    def _score_flops(self) -> float:
        """Of one token and layer."""
        query = self.hidden if self.query_width is None else self.query_width
        return 4.0 * self.seq * query * (0.5 if self.causal else 1.0)

    def layer_cost(self, tokens_per_rank: float) -> LayerCost:
        """Return the cost of a layer, as planners need it.

        Fully trained weights are sent in the type that they are computed in; pairs are sent as float32 master parameters.
        """
        trained = _MASTER_BYTES if self.of_kind.has_pairs else self.dtype_bytes
        cost = expert_layer_cost(
            self.of_kind.parameters(self.ffn_parameters, self.pair_parameters, 2.0 * self.pair_parameters),
            place=ffn_place(self.hidden),
            top_k=self.top_k,
            number=NumberBytes(trained=trained, gradient=trained, master=_MASTER_BYTES, computed=self.dtype_bytes),
            non_moe_flops=self.attention_flops(tokens_per_rank),
        )
        return replace(cost, non_moe_backward=self.attention_backward)


def load_model_shape(path: Path) -> ModelShape:
    """Read a model from YAML, with the fields of `ModelShape` except `name`, which is the file's name. See configs/models/.

    Raises:
        UserError: the file cannot be read, or a key is missing, unknown or out of range.
    """
    try:
        raw = parse_yaml(read_plain_text(path, MOST_BYTES))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(f"{path}: cannot be read as a model: {error}") from error
    known = [field for field in fields(ModelShape) if field.name != "name"]
    needed = [field.name for field in known if field.default is MISSING]
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a model is a mapping with the keys {', '.join(needed)}")
    unknown = sorted(str(key) for key in raw if key not in [field.name for field in known])
    missing = [name for name in needed if name not in raw]
    if unknown or missing:
        problems = [f"unknown: {', '.join(unknown)[:200]}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(missing)
        optional = ", ".join(field.name for field in known if field.name not in needed)
        raise UserError(f"{path}: {'; '.join(problems)}\n  a model has {', '.join(needed)} and may have {optional}")
    values: dict[str, Any] = raw
    try:
        return ModelShape(name=path.stem, **values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
