"""What a layer of experts costs, from the parameters of one expert: the one formula behind the engine, `hecate plan` and the simulator."""

from __future__ import annotations

from dataclasses import dataclass

from hecate.parallel.cost_model import LayerCost
from hecate.parallel.expert_kinds import ExpertParameters


@dataclass(frozen=True)
class NumberBytes:
    """Bytes of one number."""

    trained: int
    """of a trained parameter as it is gathered, and of its gradient"""
    master: int
    """of a trained parameter, and of each of its two moments, on the expert's owner"""
    computed: int
    """of a frozen weight and of a hidden state"""


def expert_layer_cost(expert: ExpertParameters, *, hidden: int, top_k: int, number: NumberBytes, non_moe_flops: float) -> LayerCost:
    """What a planner must know of a layer.

    Backward over forward: a trained FFN takes twice as long (gradients of its inputs and of its weights), a frozen one as long, and pairs
    as their kind says.

    Args:
        non_moe_flops: of what hides transfers, of one rank, forward.
    """
    own_ffn, pairs = 2.0 * (expert.trained_ffn + expert.frozen_ffn), 2.0 * expert.pairs
    backward = 2.0 * (2.0 * expert.trained_ffn) + 2.0 * expert.frozen_ffn + expert.pair_backward * pairs
    flops = own_ffn + pairs
    return LayerCost(
        trainable_bytes=float(number.trained * expert.trained),
        frozen_bytes=float(number.computed * expert.frozen_ffn),
        state_bytes=float(3 * number.master * expert.trained),
        top_k=top_k,
        row_bytes=float(hidden * number.computed),
        row_flops=2.0 * expert.shared_ffn,
        assignment_flops=flops,
        assignment_backward=backward / flops if flops else expert.pair_backward,
        non_moe_flops=non_moe_flops,
    )
