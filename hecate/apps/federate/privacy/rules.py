"""Check what goes together with differential privacy, the keys of `privacy`."""

import math
from collections.abc import Mapping
from typing import Any

from hecate.apps.federate.privacy.accountant import require_accountant
from hecate.apps.federate.privacy.settings import privacy_keys
from hecate.config.problems import Add, serves
from hecate.config.rules.of_apps import SectionRules
from hecate.config.schema import LEAVES, Config

_PREFIX = "privacy."
_CLIP = "privacy.clip"
_NEEDED: tuple[tuple[str, Any, str], ...] = (
    ("moe.router.input", "given", "is of adapters that nothing but their own samples trains"),
    ("data.packing", False, "clips the gradient of each sample, but a packed sequence has several"),
    ("max_grad_norm", None, "clips already, and what clips the noise with the gradient afterwards makes small steps of it"),
    ("fssdp.policy", "full", "clips on the rank that has the sample, so that no token of it may go to another rank"),
    ("fssdp.plan", "history", "reduces the gradients of all layers after a micro-step's clip, but other plans reduce each layer's at once"),
    ("fssdp.rematerialize", False, "needs the gradients of all layers at once, but rematerialize reduces each layer's at once"),
)


class PrivacyRules(SectionRules):
    """What the section `privacy` needs of other keys."""

    def checked(self, values: Mapping[str, Any], add: Add) -> Mapping[str, Any]:
        if _CLIP in values:
            _check_clip(values[_CLIP], values, add)
        return values

    def require_packages(self, config: Config) -> None:
        if privacy_keys(config).noise:
            require_accountant()

    def single_sequences(self, config: Config) -> bool:
        return privacy_keys(config).clip is not None


RULES = PrivacyRules()


def _check_clip(clip: float | None, values: Mapping[str, Any], add: Add) -> None:
    noise = values.get(_PREFIX + "noise", 0.0)
    if clip is None:
        for name in ("noise", "delta"):
            key = _PREFIX + name
            if key in values and values[key] != LEAVES[key].default:
                add(key, f"is read with {_CLIP} only, got {values[key]}", f"give {_CLIP}, or leave it out")
        return
    if values.get("deterministic"):
        why = "it clips the gradient of each sample before it is added, for which there is no such order yet"
        what = f"does not go together with deterministic: {why}"
        add(_CLIP, what, "leave one of the two out")
    if noise and math.isinf(clip):
        add(_CLIP, "must be finite with privacy.noise, which is a multiple of it", "set a number, such as the median norm of the gradients")
    if noise and isinstance(values.get("lora.r"), tuple):
        add("lora.r", "must be one number with privacy.noise, which would fill what smaller ranks are padded with", "give one rank")
    for key, needed, why in _NEEDED:
        if key in values and not serves(key, values[key], needed):
            shown = {None: "null", True: "true", False: "false"}
            what = f"must be {shown.get(needed, needed)} with {_CLIP}, which {why}; got {shown.get(values[key], values[key])}"
            add(key, what, f"set {key}={shown.get(needed, needed)}")
