"""Plans that are made after a layer's router has decided and before its tokens travel.

Before the router decides, loads are predicted from past steps. Afterwards the ranks can exchange the true loads, in one all-gather of
[experts] integers, and plan the layer from them (*exact*), or change a plan that was made from the prediction where that pays
(*calibrated*, Hecate, arXiv 2502.02581, §3.2). Every function in this file is pure, so all ranks reach the same result.

Shapes: E experts, D ranks as sources and as destinations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hecate.parallel.planners import LayerPlan, Plan, PlanInput
from hecate.parallel.planners.new_split import split_anew
from hecate.parallel.planners.policies.auto import TIE


def one_layer(given: PlanInput, index: int, loads_ED: np.ndarray, resident_ED: np.ndarray | None = None) -> PlanInput:
    """What a planner is given for one of several layers, whose loads are known.

    Args:
        resident_ED: bool [experts, ranks], see `PlanInput.resident_LED`; None: as `given` has it.
    """
    if resident_ED is None and given.resident_LED is not None:
        resident_ED = given.resident_LED[index]
    return replace(
        given,
        owner_LE=given.owner_LE[index : index + 1],
        loads_LED=loads_ED[None].astype(np.float64, copy=False),
        resident_LED=None if resident_ED is None else resident_ED[None],
        present_LED=None if given.present_LED is None else given.present_LED[index : index + 1],
        waited_for=True,
    )


def some_layers(given: PlanInput, some_L: np.ndarray) -> PlanInput:
    """What a planner is given for some of several layers, bool [layers]."""
    if some_L.all():
        return given
    return replace(
        given,
        owner_LE=given.owner_LE[some_L],
        loads_LED=None if given.loads_LED is None else given.loads_LED[some_L],
        resident_LED=None if given.resident_LED is None else given.resident_LED[some_L],
        present_LED=None if given.present_LED is None else given.present_LED[some_L],
    )


def best_after_router(
    planner: Callable[[PlanInput], Plan], given: PlanInput, present: Sequence[LayerPlan], *, splits: bool
) -> list[tuple[float, LayerPlan]]:
    """For each layer the best plan that could take the place of `present`, whose replicas have been gathered, and its `calibration_gain`.

    It is the plan that the planner makes of the true loads, or a new split over the replicas that have been gathered. It pays if its gain
    is positive. Of two that gain as much, to a billionth of the layer's seconds, it is the planner's.

    Args:
        given: the layers under their true loads.
        present: the plan of each layer.
        splits: whether a new split counts; the policies of other systems go by their own plans alone.
    """
    given = replace(given, waited_for=True)
    candidates = [planner(given)]
    if splits:
        candidates.append(split_anew(given, np.stack([plan.placement.where_ED for plan in present])))
    found = []
    for layer, now in enumerate(present):
        alone = one_layer(given, layer, given.expected_LED[layer])
        seconds = after_router(alone, now)
        gain, best = 0.0, None
        for candidate in candidates:
            plan = candidate.layer(given, layer)
            gains = calibration_gain(alone, now, plan, seconds, gain + TIE * seconds)
            if best is None or gains > gain + TIE * seconds:
                gain, best = gains, plan
        assert best is not None
        found.append((gain if gain > TIE * seconds else min(gain, 0.0), best))
    return found


def calibration_gain(given: PlanInput, present: LayerPlan, better: LayerPlan, present_seconds: float, least: float = -np.inf) -> float:
    """Seconds that a layer's micro-step is predicted to gain by `better` in place of `present`, whose replicas have been gathered.

    The replicas that `better` needs besides travel after the router has decided. Nothing hides that gather, so it counts in full. Dispatch,
    experts and the backward pass count for both plans; the gather that attention has hidden is done and counts for neither.

    Args:
        given: one layer under its true loads.
        present_seconds: what `after_router` says of `present`.
        least: a gain that is no larger need not be exact, only be no larger.
    """
    return present_seconds - after_router(given, better, present, enough=present_seconds - least)


def after_router(given: PlanInput, plan: LayerPlan, present: LayerPlan | None = None, *, enough: float = np.inf) -> float:
    """Seconds of a layer's micro-step from its router on, the gather included of what a plan needs besides what has been gathered.

    Args:
        given: one layer under its true loads.
        present: whose replicas have been gathered; None: those of `plan`.
        enough: where it takes so many seconds, they need not be exact, only be as many.
    """
    return plan.seconds_from_router(given, (plan if present is None else present).placement.where_ED, enough)
