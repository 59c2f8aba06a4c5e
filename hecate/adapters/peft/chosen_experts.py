"""Whether an adapter of an MoE model's experts has numbers for those that a run trains, and for no others."""

from __future__ import annotations

import logging

from hecate.adapters.description import Adapter
from hecate.adapters.peft.description import LoraDescription
from hecate.errors import UserError
from hecate.model.sizes.base_shape import LAYER
from hecate.parallel.values.expert_kinds import LoraShape

_log = logging.getLogger(__name__)


def for_chosen_experts(adapter: Adapter, lora: LoraShape) -> Adapter:
    """Return an adapter that training is to begin with, whose pairs are zero for all experts that do not train.

    A warning says of experts that train but have pairs of zeros: with A and B zero, the gradients of both are zero.

    Args:
        lora: of the experts of the run.

    Raises:
        UserError: an expert that does not train has numbers.
    """
    numbers = _has_numbers(adapter)
    each = bool(lora.chosen) and isinstance(lora.chosen[0], tuple)
    idle = []
    for (layer, expert), found in numbers.items():
        if each and layer >= len(lora.chosen):  # of a larger model; that its tensors do not fit is found later
            continue
        trains = not lora.chosen or expert in lora.chosen_of(layer, 0)
        if found and not trains:
            raise UserError(
                f"lora.init_from: {adapter.folder} has numbers for expert {expert} of layer {layer}, which is not among those that train\n"
                "  give it in lora.experts, or train all experts; numbers for experts that do not train are not kept"
            )
        if trains and not found:
            idle.append(f"{expert} of layer {layer}")
    if idle:
        _log.warning(
            f"hecate: warning: lora.init_from: {adapter.folder} has experts whose pairs are zeros ({len(idle)}, such as {idle[0]}); "
            "these never change, so lora.experts may leave them out"
        )
    return adapter


def _has_numbers(adapter: Adapter) -> dict[tuple[int, int], bool]:
    """(layer, expert) -> whether any number of its pairs is not zero; nothing for an adapter of another kind."""
    found: dict[tuple[int, int], bool] = {}
    description = adapter.description
    if not isinstance(description, LoraDescription):
        return found
    for module, place in description.places(adapter.tensors).items():
        if place.expert is not None and (match := LAYER.search(module)):
            key = int(match[1]), place.expert
            found[key] = found.get(key, False) or any(bool(one.any()) for one in place.pair(adapter.tensors, description.rank_of_experts))
    return found
