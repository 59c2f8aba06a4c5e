"""What a run would take and cost, for somebody who chooses a cluster: ranges of time, tokens/s and price, and what they rest on."""

from __future__ import annotations

from typing import Any

from hecate.apps.foresee.dry_run import Forecast, fits
from hecate.parallel.cluster.step_spread import short, step_spread

_AS_FAST = 1.02
"""up to this ratio of their times, two policies are called equally fast"""


def purchase_lines(found: Forecast) -> list[str]:
    """Return lines about the configured policy: a step, tokens/s, prices of a million tokens and of the run, and what times rest on."""
    run, one = found.run, found.policies[0]
    spread, bill = step_spread(run.topology), purchase(found)
    devices, rates = run.topology.world_size, bill["tokens_per_second"]
    step = (
        f"{one.policy} on {run.topology_name}" if run.groups else run.topology_name,
        f": {spread.text(one.step_seconds)} s a step of {bill['tokens_per_step']:,} tokens; tokens/s: {rates[0]:,.0f} to {rates[1]:,.0f}",
        f", {rates[0] / devices:,.0f} to {rates[1] / devices:,.0f} a device" if devices > 1 else "",
    )
    lines = ["".join(step)]
    if steps := run.config.max_steps:
        lines.append(f"the run of {steps:,} steps: {spread.text(steps * one.step_seconds / 3600)} h")
    else:
        lines.append("the run's steps follow from num_train_epochs and the data, which are not read: give max_steps to see its time")
    if price := bill["cost_per_million_tokens"]:
        lines[-1] += f"; price of a million tokens: {short(price[0])}-{short(price[1])}"
        if whole := bill["cost_of_run"]:
            lines[-1] += f", of the run: {short(whole[0])}-{short(whole[1])}"
    else:
        lines[-1] += "; prices: give --price-per-hour"
    lines.append(spread.note)
    seconds = {other.policy: other.step_seconds for other in found.policies if fits(other, run)}
    return [*lines, *replication_line(seconds, devices)]


def purchase(found: Forecast) -> dict[str, Any]:
    """Return the figures of `purchase_lines` for the configured policy as JSON values; a range is [best, worst]."""
    run, seconds = found.run, found.policies[0].step_seconds
    spread = step_spread(run.topology)
    tokens = int(run.tokens_D.sum()) * run.config.gradient_accumulation_steps
    steps = [seconds * spread.least, seconds * spread.most]
    a_second = sum(run.topology.price_per_hour) / 3600
    return {
        "step_seconds": steps,
        "tokens_per_step": tokens,
        "tokens_per_second": [tokens / step for step in reversed(steps)],
        "cost_per_million_tokens": [1e6 * a_second * step / tokens for step in steps] if a_second else None,
        "cost_of_run": [run.config.max_steps * a_second * step for step in steps] if a_second and run.config.max_steps else None,
        "source": spread.source,
        "calibrated": spread.calibrated,
    }


def replication_line(seconds: dict[str, float], devices: int) -> list[str]:
    """Return a line that says so where every expert on every device is enough; otherwise none.

    Args:
        seconds: of a step under each policy that fits.
    """
    full, others = seconds.get("full"), {policy: value for policy, value in seconds.items() if policy != "full"}
    if full is None or not others or devices == 1:
        return []
    best = min(others, key=others.__getitem__)
    if full > _AS_FAST * others[best]:
        return []
    return [
        f"replication is enough here: full, every expert on every device, fits and takes {full / others[best]:.2f} of the time of {best}, "
        "the fastest other policy; sharding experts saves memory here, not time"
    ]
