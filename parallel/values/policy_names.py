"""The order in which placement policies are listed, and names that they had in earlier versions. Configurations, commands, sweeps, metrics
and checkpoints may still have these."""

from __future__ import annotations

SAME_PLANS = ("static_ep", "full")
"""The policies whose placements no loads change."""
POLICY_ORDER = (
    *SAME_PLANS,
    *("fastermoe", "smartmoe", "flexmoe", "eplb", "llep", "echo", "laer", "ultraep", "moonep"),
    *("hecate_paper", "auto"),
)
"""Those without a planner, other systems', this project's; a policy that is not named here comes after them."""
FORMER_NAMES = {"hecate": "hecate_paper"}
"""The policy of the Hecate paper was called `hecate`, so that people took it for what this product does by default, which is `auto`."""


def current_name(policy: str) -> str:
    """Return the name that a policy has now; any other text as it is."""
    return FORMER_NAMES.get(policy, policy)


def renamed(where: str, policy: str) -> str:
    """Return the line that tells a user who wrote a former name, found at `where`, what it means now."""
    return f"{where}: the policy {policy} is called {current_name(policy)} now, as the paper's own; hecate's default is auto"
