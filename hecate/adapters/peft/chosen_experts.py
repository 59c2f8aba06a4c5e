"""Whether an adapter of an MoE model's experts has numbers for experts that a run does not train."""

from __future__ import annotations

from hecate.adapters.description import Adapter
from hecate.adapters.peft.description import LoraDescription
from hecate.errors import UserError
from hecate.model.sizes.base_shape import LAYER
from hecate.parallel.values.expert_kinds import LoraShape


def for_chosen_experts(adapter: Adapter, lora: LoraShape) -> Adapter:
    """Return an adapter that training is to begin with, whose pairs are zero for all experts that do not train.

    Args:
        lora: of the experts of the run.

    Raises:
        UserError: a pair is not zero.
    """
    description = adapter.description
    if not lora.chosen or not isinstance(description, LoraDescription):
        return adapter
    each = isinstance(lora.chosen[0], tuple)
    for module, place in description.places(adapter.tensors).items():
        if place.expert is None or (match := LAYER.search(module)) is None:
            continue
        layer = int(match[1])
        if each and layer >= len(lora.chosen):  # of a larger model; that its tensors do not fit is found later
            continue
        if place.expert not in lora.chosen_of(layer, 0) and any(
            one.any() for one in place.pair(adapter.tensors, description.rank_of_experts)
        ):
            raise UserError(
                f"lora.init_from: {adapter.folder} has numbers for expert {place.expert} of layer {layer}, "
                "which is not among those that train\n"
                "  give it in lora.experts, or train all experts; numbers for experts that do not train are not kept"
            )
    return adapter
