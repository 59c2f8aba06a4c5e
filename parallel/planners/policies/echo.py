"""Spare copies for what overflows (ECHO, Megatron-LM pull request 2368)."""

from __future__ import annotations

import numpy as np

from hecate.parallel.planners.plan import PlanInput, Policy
from hecate.parallel.planners.rivals.source_split import SourceSplit, SplitPlan


def plan_echo(given: PlanInput) -> SplitPlan:
    """What each rank has above the mean is laid over what the others have below it; each slot keeps one of the largest chunks.

    A rank keeps its coldest experts up to the mean and spills the rest. Spills and spare capacities are sorted descending and laid side by
    side; where an expert's spill overlaps a rank's capacity is a chunk. A rank keeps as many of its chunks as it has slots, the largest;
    the others stay at home. Each source gives to a chunk in proportion to its assignments of the expert; ECHO rounds these down and deals
    out what is left, which here it does not. For exact loads. Devices count as equally fast.
    """
    load_LE, owned_LED, owner_LE = given.expected_LED.sum(-1), given.owned_LED, given.owner_LE
    home_LD = (owned_LED * load_LE[..., None]).sum(1)
    mean_L1 = load_LE.sum(-1, keepdims=True) / given.world_size
    spill_LE = _spill(load_LE, owner_LE, home_LD, mean_L1)
    spare_LD = np.maximum(mean_L1 - home_LD, 0)
    spills_LE1, spares_L1D = _intervals(spill_LE)[..., None], _intervals(spare_LD)[:, :, None]
    overlap_LED = np.minimum(spills_LE1[1], spares_L1D[1]) - np.maximum(spills_LE1[0], spares_L1D[0])
    # Sums of fractions are not exact: without the threshold an expert would travel for what is only rounding.
    chunk_LED = np.where(overlap_LED > 1e-9 * mean_L1[..., None], overlap_LED, 0.0)
    place_LED = np.argsort(np.argsort(-chunk_LED, axis=1, kind="stable"), axis=1, kind="stable")
    kept_LED = np.where(place_LED < given.slots_D, chunk_LED, 0.0)
    quota_LED = kept_LED + owned_LED * np.maximum(load_LE - kept_LED.sum(-1), 0)[..., None]
    return SplitPlan(owner_LE, owned_LED | (kept_LED > 0), quota_LED, source_split=SourceSplit("alike", quota_LED))


def _spill(load_LE: np.ndarray, owner_LE: np.ndarray, home_LD: np.ndarray, mean_L1: np.ndarray) -> np.ndarray:
    """float64 [layers, experts]: what a rank's experts exceed the mean by, when the rank fills up with the coldest first."""
    order_LE = np.lexsort((load_LE, owner_LE))
    sorted_LE = np.take_along_axis(load_LE, order_LE, axis=1)
    others_LD = np.cumsum(home_LD, axis=1) - home_LD  # what is sorted in front of a rank's experts
    filled_LE = np.cumsum(sorted_LE, axis=1) - np.take_along_axis(others_LD, np.take_along_axis(owner_LE, order_LE, axis=1), axis=1)
    spill_LE = np.zeros_like(load_LE)
    np.put_along_axis(spill_LE, order_LE, np.clip(filled_LE - mean_L1, 0, sorted_LE), axis=1)
    return spill_LE


def _intervals(length_LX: np.ndarray) -> np.ndarray:
    """float64 [2, layers, X]: start and end of each length when they are laid end to end, the longest first."""
    order_LX = np.argsort(-length_LX, axis=1, kind="stable")
    end_LX = np.cumsum(np.take_along_axis(length_LX, order_LX, axis=1), axis=1)
    result = np.empty((2, *length_LX.shape))
    np.put_along_axis(result[1], order_LX, end_LX, axis=1)
    result[0] = result[1] - length_LX
    return result


POLICY = Policy(plan_echo, own_split=True)
