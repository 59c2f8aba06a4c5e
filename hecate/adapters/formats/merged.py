"""Merge a LoRA into its base model: attention, dense FFNs, and the experts of MoE models in every layout that files have.

The model is read and written tensor by tensor, and keeps its layout: names, types, and which file holds what.

Shapes: E experts, r rank, D hidden, F ffn, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.card import CARD, model_card
from hecate.adapters.description import Adapter
from hecate.adapters.folder import CHAT_TEMPLATE
from hecate.adapters.model_files import DTYPE_NAMES, save_config, write_model
from hecate.adapters.peft.description import LoraDescription, expert_names, experts_paths, linear_names
from hecate.adapters.peft.targets import adapts
from hecate.adapters.places import expert_a, expert_b
from hecate.checkpoint.layout import TensorEntry
from hecate.data.chat.templates import FILE
from hecate.errors import UserError
from hecate.io.durable import write_durable
from hecate.io.plain_files import read_plain
from hecate.model.files.load import base_of, save_tokenizer
from hecate.model.files.stored_experts import EXPERTS, ROLES, usual_name
from hecate.model.files.stored_model import StoredModel, open_stored

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_COPIED = re.compile(
    r"(?i:(generation_|preprocessor_|processor_|tokenizer_|video_preprocessor_)?config|tokenizer|special_tokens_map|added_tokens|vocab|chat_template"
    r"|image_processor|processor)\.json|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece(\.bpe)?)\.model|chat_template\.jinja|tekken\.json"
    r"|(?i:(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)(\.(md|txt))?)"
)
"""names of files that belong to a model beside its weights: configuration, tokenizer, template, terms of use"""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
"""the endings of files that hold weights, or say where they are, which are written anew"""


@dataclass(frozen=True)
class WeightChange:
    """What becomes of a weight of the base."""

    shape: tuple[int, ...]
    """of the weights that it can be made to"""
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _ExpertPairs:
    """The pairs of all experts of a layer for one projection, as PEFT joins them."""

    name_a: str
    name_b: str
    a: Tensor
    """[E·r, I]"""
    b: Tensor
    """[O, r·E]"""
    experts: int


class MergedModel(AdapterFormat):
    """The base model with a LoRA merged into it."""

    name = "merged"
    what = "a whole model"
    holds = (LoraDescription,)

    def export(self, adapter: Adapter, out: Path) -> list[str]:
        assert isinstance(adapter.description, LoraDescription)
        base = open_stored(base_of(adapter.folder, adapter.description.base_model_name_or_path))
        return write_merged(out, base, adapter.tensors, adapter.description)


FORMAT = MergedModel()


def changes_of(base: StoredModel, tensors: Mapping[str, Tensor], config: LoraDescription) -> dict[str, WeightChange]:
    """Return what the adapter makes of each weight that it changes, by the weight's name in the base.

    Raises:
        UserError: a weight that the adapter is for has no pair in it, a pair or a router belongs to no weight, or one has the wrong shape.
    """
    pairs_of_layers = _expert_pairs(tensors, config)
    routers = {_layer_of(name): name for name in tensors if name.endswith(tuple(f".{end}.weight" for end in config.modules_to_save))}
    changes: dict[str, WeightChange] = {}
    used: set[str] = set()
    # The adapter has experts and routers by layers, so that each layer of the base must have them once: layer and end of the name, name.
    by_layer: dict[tuple[int | None, str], str] = {}
    for name, weight in base.weights.items():
        layer = _layer_of(name)
        place: tuple[int | None, str] | None = None
        if match := EXPERTS.search(usual_name(name)):
            layer, projection = int(match[1]), _projection_of(match[2])
            if projection not in config.projections:
                continue
            place = layer, match[2]
            pairs = pairs_of_layers.get(layer, {}).get(projection)
            change = None if pairs is None else _of_expert(match[2], pairs, config.scale_of_experts)
            if pairs is None or change is None:
                raise UserError(f"has no pair for {projection} of layer {layer}, where the base model has {name}")
            used |= {pairs.name_a, pairs.name_b}
        elif layer in routers and usual_name(name).endswith((".gate.weight", ".router.weight")):
            place = layer, "router"
            used.add(routers[layer])
            change = _replaced_by(tensors[routers[layer]])
        else:
            path = name.removesuffix(".weight")
            name_a, name_b = linear_names(path)
            if name_a not in tensors or name_b not in tensors:
                if name != path and layer is not None and len(weight.shape) == 2 and adapts(config.target_modules, path):
                    missing = name_a if name_a not in tensors else name_b
                    raise UserError(f"has no tensor {missing}, but its target_modules name {path}, and the base model has {name}")
                continue
            used |= {name_a, name_b}
            change = _plus_pair(tensors[name_a], tensors[name_b], config.scale)
        if place is not None and by_layer.setdefault(place, name) != name:
            raise UserError(f"does not say for which of two weights of layer {layer} it is: {by_layer[place]}, {name}")
        if change.shape != weight.shape:
            raise UserError(f"what it has for {name} has the shape {list(change.shape)}, but the base model's is {list(weight.shape)}")
        changes[name] = change
    _require_all_experts(pairs_of_layers, by_layer)
    if left := sorted(set(tensors) - used):
        if whole := [name for name in left if ".lora_" not in name]:
            raise UserError(f"has a weight that was trained as a whole, {whole[0]}; of such only routers can be merged")
        raise UserError(f"the tensor {left[0]} ({len(left)} such) belongs to no weight of the base model")
    return changes


def write_merged(folder: Path, base: StoredModel, tensors: Mapping[str, Tensor], config: LoraDescription) -> list[str]:
    """Write the base model with the adapter merged into it to the new folder `folder`; what the user should know, line by line.

    Raises:
        UserError: as `changes_of`; all B are zero; or the disk fails.
    """
    changes = changes_of(base, tensors, config)
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if not name.endswith(".lora_A.weight")):
        raise UserError("all its B are zero: it was never trained, and the merged model would be the base model")
    changed = 0

    def fetch(name: str) -> Tensor:
        nonlocal changed
        before = base.read(name)
        if name not in changes:
            return before.contiguous()
        after = changes[name].make(before).contiguous()
        changed += not torch.equal(before, after)
        return after

    entries = {name: TensorEntry(one.file, DTYPE_NAMES[one.dtype], one.shape, digest="") for name, one in base.weights.items()}
    facts = {"base model": config.base_model_name_or_path, "merged": f"LoRA of rank {config.r} into {len(changes)} weights"}
    card = model_card(config.base_model_name_or_path, "As any other model of its kind.", facts, ("lora", "merged"))
    template = config.extra.get(CHAT_TEMPLATE)
    notes: list[str] = []
    write_model(folder, entries, fetch, lambda staging: notes.extend(add_files_of(base, staging, card, template)))
    note = f"{changed} of {len(changes)} adapted weights differ from the base model's"
    if changed < len(changes):
        note += "\n  the others are changed by less than their type can hold, or their B is zero"
    return [*note.splitlines(), *notes]


def add_files_of(base: StoredModel, folder: Path, card: bytes, template: str | None = None) -> list[str]:
    """Copy the files of the base model that belong to it beside weights, add the model card, and return what the user should know.

    The folder that is written may be published, and the base model's may have been made by somebody else. So a file is copied only if its
    name is known, and a link only if it leads to a file of the model itself: in its folder, or in its part of the hub's cache.

    Args:
        template: the chat template; None: the base model's own.

    Raises:
        UserError: a file with a known name is a link to somewhere else, is no plain file, or is larger than any such file.
    """
    write_durable(folder / CARD, [card])
    if base.source.gguf_file is not None:
        save_config(base.config, folder)
        save_tokenizer(base.source, folder, template)
        return []
    if template is not None:
        write_durable(folder / FILE, [template.encode()])
    ours = (CARD,) if template is None else (CARD, FILE)
    left_out = []
    for path in sorted(base.source.folder.iterdir()):
        if _COPIED.fullmatch(path.name) and path.name not in ours:
            write_durable(folder / path.name, [_read_own(path)])
        elif path.is_file() and path.name not in ours and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
            left_out.append(path.name)
    if not left_out:
        return []
    return [f"{len(left_out)} files beside the base model's weights are not copied, such as {', '.join(left_out[:3])}"]


def _read_own(path: Path) -> bytes:
    """The content of a file of a model's folder."""
    real, folder = path.resolve(), path.parent.resolve()
    of_cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not real.is_relative_to(folder) and not real.is_relative_to(of_cache):
        raise UserError(
            f"{path}: is a link to {real}, outside the model's folder, and is not copied\n  replace it by the file, or remove it"
        )
    try:
        return read_plain(real)
    except OSError as error:
        raise UserError(f"{path}: cannot be copied: {error.strerror or error}") from None


def plus_pair(weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """Return W + scale · B A, computed in float32 or wider, in W's type."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    return torch.addmm(weight_OI.to(wide), b_Or.to(wide), a_rI.to(wide), alpha=scale).to(weight_OI.dtype)


def _plus_pair(a_rI: Tensor, b_Or: Tensor, scale: float) -> WeightChange:
    return WeightChange((len(b_Or), a_rI.shape[1]), lambda weight_OI: plus_pair(weight_OI, a_rI, b_Or, scale))


def _replaced_by(router: Tensor) -> WeightChange:
    return WeightChange(tuple(router.shape), lambda weight: router.to(weight.dtype))


def _expert_pairs(tensors: Mapping[str, Tensor], config: LoraDescription) -> dict[int, dict[str, _ExpertPairs]]:
    """By layer and projection."""
    found: dict[int, dict[str, _ExpertPairs]] = {}
    for path in experts_paths(tensors):
        of_layer = found.setdefault(_required_layer(path), {})
        for projection, (name_a, name_b) in expert_names(path, config.projections).items():
            a, b = tensors[name_a], tensors[name_b]
            of_layer[projection] = _ExpertPairs(name_a, name_b, a, b, a.shape[0] // config.rank_of_experts)
    return found


def _require_all_experts(pairs_of_layers: Mapping[int, Mapping[str, _ExpertPairs]], stored: Iterable[tuple[int | None, str]]) -> None:
    """Raises UserError: a layer of the adapter has pairs of more experts than the base model, whose experts are stored one by one.

    Args:
        stored: layers and ends of names of the base's experts. All experts in one weight have its shape, which is compared elsewhere.
    """
    numbers: dict[int | None, set[str]] = {}
    for layer, rest in stored:
        if rest[0].isdigit():
            numbers.setdefault(layer, set()).add(rest.partition(".")[0])
    for layer, of_layer in pairs_of_layers.items():
        for projection, pairs in of_layer.items():
            if layer in numbers and len(numbers[layer]) != pairs.experts:
                experts = f"{pairs.experts} experts, but the base model has {len(numbers[layer])}"
                raise UserError(f"has pairs for {projection} of layer {layer} of {experts}")


def _projection_of(rest: str) -> str:
    """PEFT's name of what a stored weight of experts belongs to. `rest`: see `_of_expert`."""
    if rest in ("gate_up_proj", "down_proj"):
        return rest
    return "down_proj" if ROLES.get(rest.partition(".")[2]) == "down" else "gate_up_proj"


def _of_expert(rest: str, pairs: _ExpertPairs, scale: float) -> WeightChange | None:
    """What becomes of a stored weight of experts; None: the pairs are not for it.

    Args:
        rest: its name after `experts.`: gate_up_proj or down_proj of all experts, or NUMBER.gate_proj.weight and the like.
    """
    if rest in ("gate_up_proj", "down_proj"):
        return _all_experts(pairs, scale)
    number, _, last = rest.partition(".")
    if last not in ROLES or not number.isdecimal() or int(number) >= pairs.experts:
        return None
    b_Or = expert_b(pairs.b, int(number), pairs.experts)
    halves = {"gate": b_Or[: len(b_Or) // 2], "up": b_Or[len(b_Or) // 2 :], "down": b_Or}
    return _plus_pair(expert_a(pairs.a, int(number), pairs.experts), halves[ROLES[last]], scale)


def _all_experts(pairs: _ExpertPairs, scale: float) -> WeightChange:
    a, b, experts = pairs.a, pairs.b, pairs.experts

    def make(weight_EOI: Tensor) -> Tensor:
        made = torch.empty_like(weight_EOI)
        for expert in range(experts):
            made[expert] = plus_pair(weight_EOI[expert], expert_a(a, expert, experts), expert_b(b, expert, experts), scale)
        return made

    return WeightChange((experts, len(b), a.shape[1]), make)


def _layer_of(name: str) -> int | None:
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def _required_layer(path: str) -> int:
    layer = _layer_of(f"{path}.")
    if layer is None:
        raise UserError(f"{path}: adapts experts outside the model's decoder layers")
    return layer
