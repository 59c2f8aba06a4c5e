"""Where the host may wait for the device in a training step: one table for mock GPUs and for real ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
READERS = frozenset({"parallel/comm/aborts.py", "parallel/comm/host_read.py"})
"""files whose functions read for their callers, which are the places of these waits"""


def place_of(frame: FrameType | None) -> str:
    """FILE:FUNCTION of the innermost line of the project's own, without its tests; "?": there is none."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
            name = str(path.resolve().relative_to(ROOT))
            if name not in READERS:
                return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def expected_waits(
    *,
    layers: int,
    micro_steps: int,
    tokens_travel: bool = False,
    plans_by_micro_step: bool = False,
    computes_twice: bool = False,
    several_groups: bool = False,
    torch_path: bool = False,
) -> Counter[str]:
    """Place -> waits of one rank in one training step, in which nothing is re-sharded.

    Args:
        layers: number of MoE layers.
        tokens_travel: tokens go to the ranks of their experts in every layer: static_ep.
        plans_by_micro_step: the placement is planned from each micro-step's loads: fssdp.plan exact or calibrated.
        computes_twice: layers run again in the backward pass: gradient_checkpointing.
        several_groups: there is more than one sharding group: fssdp.shard_size.
        torch_path: kernels is torch, whose products the host cuts by expert.
    """
    calls = layers * micro_steps
    forward_passes = calls * (2 if computes_twice else 1)
    waits = Counter(
        {
            "hecate/engine/step.py:by_rank": 1,
            "hecate/train/steps/step_totals.py:exchange_totals": 1,
        }
    )
    if tokens_travel:
        waits["parallel/comm/dispatch.py:dispatch"] += forward_passes
    if plans_by_micro_step:
        waits["hecate/engine/step.py:by_rank"] += calls
    if several_groups:
        waits["hecate/engine/step.py:close"] += 1
    if torch_path:
        waits["kernels/common/assignments.py:assignment_tiles"] += 2 * forward_passes
    return waits
