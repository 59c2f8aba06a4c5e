"""Find the launch configurations that are fastest on this GPU, by timing a layer with each candidate of each kernel.

Whole layers are timed, forward and backward, because kernels share caches and maps. One kernel is varied at a time, in the order of the
launches, and its best configuration is kept. `save` writes the result to `kernels/tuned/DEVICE.json`, which `launch_config.choose` reads;
without that file the tables are used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hecate.io.durable import replace_file
from hecate.kernels.common.launch_config import (
    Key,
    LaunchConfig,
    Rule,
    Tuned,
    by_rule,
    forget_tuned,
    from_json,
    to_json,
    trying,
    tuned_for,
    tuned_path,
)

logger = logging.getLogger(__name__)

WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
MIN_BLOCK, MAX_BLOCK = 16, 256
GAIN = 0.99
"""a candidate counts as faster only if it takes at most this share of the best time so far; smaller gains may be noise"""
SAMPLES = 7


def tune(step: Callable[[], Sequence[Tensor]], device: torch.device, *, tolerance: float = 0.01) -> Tuned:
    """Time candidates and return the configurations, other than the current ones, that make `step` faster.

    Args:
        step: a function that runs a layer and returns its results, the same each time.
        tolerance: the largest relative difference, in the Frobenius norm, of a candidate's results from the current ones.

    Raises:
        RuntimeError: `device` is not a GPU.
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"kernels can be tuned on a GPU only, not on {device.type}: elsewhere the tables of launch configurations decide"
        )
    with trying({}) as asking:
        wanted = [result.clone() for result in step()]
    best: dict[Key, LaunchConfig] = {}
    with torch.cuda.device(device):
        for key, (rules, sm) in asking.asked.items():
            in_force = _in_force(key, rules, sm, device)
            timed = _timed(step, wanted, tolerance, best, key, candidates(in_force, rules, sm))
            chosen = fastest(timed)
            if chosen is not None and chosen != in_force:
                best[key] = chosen
    return tuned(best)


def candidates(in_force: LaunchConfig, rules: Iterable[Rule], sm: int) -> list[LaunchConfig]:
    """Return the current configuration, the table's others for this kind of GPU, and each variant of the current one with one change."""
    found = [in_force, *(rule.config for rule in rules if 0 < rule.min_sm <= sm)]
    found += [replace(in_force, num_warps=warps) for warps in WARPS]
    found += [replace(in_force, num_stages=stages) for stages in STAGES]
    for name, size in in_force.blocks.items():
        for other in (size // 2, size * 2):
            # Blocks of one or two rows belong to kernels without products, which take any.
            if min(MIN_BLOCK, size) <= other <= max(MAX_BLOCK, size):
                found.append(replace(in_force, blocks={**in_force.blocks, name: other}))
    return [config for index, config in enumerate(found) if config not in found[:index]]


def fastest(timed: Iterable[tuple[LaunchConfig, float]]) -> LaunchConfig | None:
    """Return the first configuration, or the last one that was clearly faster than the best before it; None if there is none."""
    best: tuple[LaunchConfig, float] | None = None
    for config, ms in timed:
        if best is None or ms < GAIN * best[1]:
            best = config, ms
    return None if best is None else best[0]


def tuned(configs: Mapping[Key, LaunchConfig]) -> Tuned:
    """Return the configurations in the form that `launch_config` reads."""
    found: dict[str, dict[tuple[int, int], LaunchConfig]] = {}
    for (name, rank, itemsize), config in configs.items():
        found.setdefault(name, {})[rank, itemsize] = config
    return Tuned(found)


def save(found: Tuned, device_name: str, path: Path | None = None) -> Path:
    """Add the configurations to the file of this kind of device, replacing those of the same kernels. Returns the file's path."""
    path = path or tuned_path(device_name)
    known = dict(from_json(json.loads(path.read_text(encoding="utf-8"))).configs) if path.is_file() else {}
    for name, configs in found.configs.items():
        known[name] = {**known.get(name, {}), **configs}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [json.dumps(to_json(Tuned(known)), indent=1).encode() + b"\n"])
    forget_tuned()
    return path


def _in_force(key: Key, rules: tuple[Rule, ...], sm: int, device: torch.device) -> LaunchConfig:
    name, rank, itemsize = key
    known = tuned_for(torch.cuda.get_device_name(device)).configs.get(name, {}).get((rank, itemsize))
    return known or by_rule(name, rules, rank=rank, itemsize=itemsize, sm=sm)


def _timed(
    step: Callable[[], Sequence[Tensor]],
    wanted: Sequence[Tensor],
    tolerance: float,
    best: Mapping[Key, LaunchConfig],
    key: Key,
    configs: Iterable[LaunchConfig],
) -> Iterator[tuple[LaunchConfig, float]]:
    """Yield each configuration that compiles, fits and gives the right results, with its milliseconds."""
    for config in configs:
        with trying({**best, key: config}):
            try:
                off = max((_distance(result, right) for result, right in zip(step(), wanted, strict=True)), default=0.0)
                if not off <= tolerance:
                    logger.warning("%s: %s is wrong by %.2g", key[0], config, off)
                    continue
                ms = _milliseconds(step)
            # A candidate may exceed what the compiler or the GPU supports; it is then skipped.
            except Exception as error:  # noqa: BLE001
                logger.info("%s: %s does not run: %s", key[0], config, str(error).strip()[:200])
                continue
        logger.info("%s: %s takes %.3f ms", key[0], config, ms)
        yield config, ms


def _distance(result: Tensor, right: Tensor) -> float:
    norm = float(right.float().norm())
    return float((result.float() - right.float()).norm()) / (norm or 1.0)


def _milliseconds(step: Callable[[], Sequence[Tensor]]) -> float:
    times = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
