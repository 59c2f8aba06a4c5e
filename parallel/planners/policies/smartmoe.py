"""Swapping whole experts between devices (SmartMoE, USENIX ATC 23)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.planners.plan import Plan, PlanInput, Policy
from hecate.parallel.planners.rivals.expert_packing import even_split, pack_copies


def plan_smartmoe(given: PlanInput) -> Plan:
    """Experts by load descending, each to the least-loaded device with room for it, its owner on ties; E/D experts on a device.

    Nothing is replicated: an expert that moves takes a slot on its new device, and its owner serves none of its assignments. Without slots
    it stays. A layer's new places are taken up only if its busiest device gets less. SmartMoE replans every 10 iterations from the
    loads of the last 2, which is the caller's affair. Devices count as equally fast.
    """
    load_LE, owned_LED = given.expected_LED.sum(-1), given.owned_LED
    room = -(-given.num_experts // given.world_size)
    packed_LED = pack_copies(load_LE, np.ones_like(given.owner_LE), given.owner_LE, given.slots_D, room=room)
    before_LED, after_LED = even_split(load_LE, owned_LED), even_split(load_LE, packed_LED)
    better_L = after_LED.sum(1).max(-1) < before_LED.sum(1).max(-1)
    quota_LED = np.where(better_L[:, None, None], after_LED, before_LED)
    return Plan(given.owner_LE, np.where(better_L[:, None, None], packed_LED | owned_LED, owned_LED), quota_LED)


POLICY = Policy(plan_smartmoe)
