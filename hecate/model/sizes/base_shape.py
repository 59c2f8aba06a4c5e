"""Read the sizes of a base model's layers from its tensors' names and shapes, without loading weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hecate.errors import UserError
from hecate.model.files.stored_experts import LayerExperts, expert_layers, no_experts, no_gguf, refuse_experts, usual_name
from hecate.model.files.tensor_shapes import model_config, numel, tensor_shapes, tensors_of
from hecate.parallel.values.expert_kinds import ExpertKind

_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one decoder layer."""

    hidden: int
    ffn: int
    """The inner size of the FFN; where units are linears and the FFN is not gated, it is found by shapes alone."""
    parameters: int
    linears: tuple[tuple[str, int, int], ...]
    """The last name, outputs and inputs of each weight outside the FFN, or outside router and experts; with those of an FFN that is not
    gated."""
    experts: int = 0
    """The number of the model's own experts, whose inner size is `ffn`."""
    ffn_linears: tuple[tuple[str, int, int], ...] = ()
    """The last name, outputs and inputs of each of the FFN's weights; nothing for a layer with experts."""
    normalized: int = 0
    """The outputs of the projections of queries and of keys that a norm of their own follows, as in Qwen3."""

    @property
    def linear_parameters(self) -> int:
        return sum(outputs * inputs for _, outputs, inputs in self.linears)

    @property
    def all_linears(self) -> tuple[tuple[str, int, int], ...]:
        return self.linears + self.ffn_linears

    @property
    def query_width(self) -> int:
        """The number of heads times their size, which is the number of inputs of the output projection."""
        return next((inputs for name, _, inputs in self.linears if name in _OUTPUT_NAMES), self.hidden)


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a decoder-only language model, whose FFNs are gated unless units are linears."""

    layers: tuple[LayerShape, ...]
    vocabulary: int
    parameters: int
    """The number of all parameters, with a tied output projection counted once."""
    top_k: int | None = None
    """The number of experts per token, if the model has experts."""


def read_base_shape(path: Path, kind: ExpertKind, num_hidden_layers: int | None = None) -> BaseShape:
    """Return the sizes of the model at `path` (see `hecate.config.find_model`), from file headers.

    Args:
        num_hidden_layers: the number of first layers to keep; None: all.
        kind: the kind of experts to insert, which decides whether the model must have experts of its own or must have none.

    Raises:
        UserError: a file is damaged, the architecture is not one that experts can be put into, or there are fewer layers.
    """
    shapes = {usual_name(name): shape for name, shape in tensor_shapes(path).items()}
    experts = _own_experts(path, shapes, kind)
    by_layer: dict[int, dict[str, tuple[int, ...]]] = {}
    rest: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = LAYER.search(name)
        if match is None:
            rest[name] = shape
        else:
            by_layer.setdefault(int(match[1]), {})[match[2]] = shape
    count = len(by_layer)
    if not count or sorted(by_layer) != list(range(count)):
        raise UserError(f"{path}: no decoder layers found among its {len(shapes)} tensors; is the download complete?")
    if num_hidden_layers is not None and num_hidden_layers > count:
        raise UserError(f"model.num_hidden_layers: {num_hidden_layers}, but the model has only {count}")
    layers = tuple(
        _moe_layer_shape(by_layer[index], experts[index])
        if index in experts
        else _layer_shape(by_layer[index], kind, f"{path}: layer {index}")
        for index in range(num_hidden_layers or count)
    )
    embeddings = [shape for name, shape in rest.items() if "embed" in name and len(shape) == 2 and shape[1] == layers[0].hidden]
    if not embeddings:
        raise UserError(f"{path}: no token embeddings [vocabulary, {layers[0].hidden}] found")
    parameters = sum(map(numel, rest.values())) + sum(layer.parameters for layer in layers)
    return BaseShape(layers, max(shape[0] for shape in embeddings), parameters, _top_k(path) if experts else None)


def _own_experts(path: Path, names: Iterable[str], kind: ExpertKind) -> dict[int, LayerExperts]:
    """Return the model's own experts by layer."""
    if not kind.of_moe_base:
        refuse_experts(names, path, kind)
        return {}
    if path.suffix == ".gguf":
        raise no_gguf(path, kind)
    experts = expert_layers(tensors_of(path), path)
    if not experts:
        raise no_experts(path, kind)
    return experts


def _top_k(path: Path) -> int:
    top_k = model_config(path).get("num_experts_per_tok")
    if type(top_k) is not int or top_k < 1:
        raise UserError(f"{path}: num_experts_per_tok of config.json must be a whole number from 1, got {top_k!r}")
    return top_k


def _moe_layer_shape(tensors: dict[str, tuple[int, ...]], experts: LayerExperts) -> LayerShape:
    """Return the sizes of a layer with experts.

    `linears` are all matrices except those of experts and the router, which is the weight [experts, hidden] in the module of the experts.
    """
    block = next(name for name in tensors if ".experts." in name).partition(".experts.")[0]
    router = (experts.num_experts, experts.hidden)
    linears = []
    for name, shape in tensors.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if kind == "weight" and len(shape) == 2 and ".experts." not in name and not (parent == block and shape == router):
            linears.append((last, shape[0], shape[1]))
    return LayerShape(
        experts.hidden,
        experts.ffn,
        sum(map(numel, tensors.values())),
        tuple(linears),
        experts.num_experts,
        normalized=_normalized(tensors, linears),
    )


def _layer_shape(tensors: dict[str, tuple[int, ...]], kind: ExpertKind, where: str) -> LayerShape:
    by_parent: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        module, _, last_part = name.rpartition(".")
        if last_part == "weight" and len(shape) == 2:
            parent, _, last = module.rpartition(".")
            by_parent.setdefault(parent, {})[last] = shape
    found = {parent: sizes for parent, weights in by_parent.items() if (sizes := _gated(weights)) is not None}
    named = [(parent, last, shape) for parent, weights in by_parent.items() for last, shape in weights.items()]
    if len(found) != 1 and kind.over_linears and named:  # such experts need no gated FFN
        return _plain_layer_shape(tensors, tuple((last, shape[0], shape[1]) for _, last, shape in named))
    if len(found) != 1:
        raise UserError(
            f"unsupported architecture: {where} has {len(found) or 'no'} gated FFN{'s' if len(found) > 1 else ''}; exactly one is needed.\n"
            "  a gated FFN has three weights under one module: two [F, D] and one [D, F] (fused or expert projections are not supported)"
        )
    ((of_ffn, (hidden, ffn)),) = found.items()
    linears = tuple((last, shape[0], shape[1]) for parent, last, shape in named if parent != of_ffn)
    ffn_linears = tuple((last, shape[0], shape[1]) for parent, last, shape in named if parent == of_ffn)
    return LayerShape(
        hidden, ffn, sum(map(numel, tensors.values())), linears, ffn_linears=ffn_linears, normalized=_normalized(tensors, linears)
    )


def _plain_layer_shape(tensors: dict[str, tuple[int, ...]], linears: tuple[tuple[str, int, int], ...]) -> LayerShape:
    """Return the sizes of a layer without one gated FFN. Most of its weights read hidden states, and the widest that leads back to these,
    attention's output left out, is taken for the FFN's."""
    ((hidden, _),) = Counter(inputs for _, _, inputs in linears).most_common(1)
    ffn = max((inputs for name, outputs, inputs in linears if outputs == hidden and name not in _OUTPUT_NAMES), default=0)
    return LayerShape(hidden, ffn, sum(map(numel, tensors.values())), linears, normalized=_normalized(tensors, linears))


def _normalized(tensors: Iterable[str], linears: Iterable[tuple[str, int, int]]) -> int:
    """Return the outputs of the projections `q_proj` and `k_proj` beside which a layer has a `q_norm` or a `k_norm`."""
    norms = {name.removesuffix(".weight").rpartition(".")[2] for name in tensors}
    return sum(outputs for name, outputs, _ in linears if name in ("q_proj", "k_proj") and name.replace("_proj", "_norm") in norms)


def _gated(weights: dict[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Return (hidden, ffn) if the weights are those of a gated FFN, and None otherwise."""
    shapes = list(weights.values())
    twice = [shape for shape in shapes if shapes.count(shape) >= 2]
    if len(shapes) != 3 or not twice or any(shapes.count(shape) == 1 and shape != twice[0][::-1] for shape in shapes):
        return None
    return twice[0][1], twice[0][0]
