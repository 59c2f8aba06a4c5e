"""The order in which adapters of unsloth have the columns of the experts' B.

PEFT's B [outputs, r·E] is rank-major, B.view(outputs, r, E) (`hecate.adapters.places`). Before unsloth_zoo 2026.9.6 unsloth trained
it grouped by experts, B.view(outputs, E, r), for some families of models. Later versions say in adapter_config.json which it is, and take
one that does not for a file of before (`saved_lora_b_layouts` of unsloth_zoo 2026.10.9, `temporary_patches/moe_utils.py`):

    "lora_B_layout": "grouped_by_expert"                                             of all projections
    "unsloth_fused_expert_lora": {"parameters": {"down_proj": {"lora_B_layout": "rank_major", ...}, ...}, ...}        of each

Both keys stand at the top, or under auto_mapping, or at both places, of which the top one counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hecate.errors import UserError

_log = logging.getLogger(__name__)
RANK_MAJOR, GROUPED_BY_EXPERT = "rank_major", "grouped_by_expert"
_KEY, _DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"
_FAMILY = re.compile(r"(?:transformers\.models\.|unsloth_compiled_module_)(\w+)")
_GROUPED_FAMILIES = frozenset(
    (
        *("deepseek_v3", "ernie4_5_moe", "ernie4_5_vl_moe", "gemma4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "lfm2_moe", "mixtral"),
        *("qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe"),
    )
)
"""those whose experts unsloth trained in its own order; of all others PEFT computed them"""


def grouped_projections(value: Mapping[str, Any], projections: tuple[str, ...], folder: Path) -> set[str]:
    """Return the projections whose B is grouped by experts. What is read of a file that does not say it, a warning says.

    Args:
        value: adapter_config.json of an adapter of an MoE model's experts.
        folder: the adapter's, for the warning.

    Raises:
        UserError: the layout is unknown, or the file says neither the layout nor the family of the model.
    """
    mapping = value.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    for place in (value, mapping):
        if (layouts := _said(place, projections)) is not None:
            return {projection for projection, layout in layouts.items() if layout == GROUPED_BY_EXPERT}
    if not mapping.get("unsloth_fixed"):
        return set()
    family = _FAMILY.match(str(mapping.get("parent_library")))
    if family is None:
        raise UserError(
            f"written by unsloth, but it does not say in which order the columns of the experts' B are, nor of which family the model is\n"
            f'  add "{_KEY}": "{GROUPED_BY_EXPERT}" if unsloth_zoo was older than 2026.9.6, otherwise "{_KEY}": "{RANK_MAJOR}"'
        )
    if family[1] not in _GROUPED_FAMILIES:
        return set()
    _log.warning(
        '%s: written by unsloth, and without "%s": the experts\' B is read as unsloth_zoo before 2026.9.6 trained it, grouped by experts.\n'
        '  If a later version has written it, or it was trained with UNSLOTH_MOE_LORA_MERGED=1, add "%s": "%s" to adapter_config.json.',
        *(folder, _KEY, _KEY, RANK_MAJOR),
    )
    return set(projections)


def rank_major(b_OEr: Tensor, experts: int) -> Tensor:
    """Return B of all experts in PEFT's order. Column e·r + j becomes column j·E + e.

    Args:
        b_OEr: [outputs, E·r], grouped by experts.
    """
    return b_OEr.unflatten(1, (experts, -1)).transpose(1, 2).flatten(1)


def _said(place: Mapping[str, Any], projections: tuple[str, ...]) -> dict[str, str] | None:
    """The layout of each projection; None: nothing is said here. Raises UserError: there is no such layout."""
    detail = place.get(_DETAIL)
    parameters = detail.get("parameters") if isinstance(detail, dict) else None
    if isinstance(parameters, dict):
        found = {name: str(one.get(_KEY)) for name, one in parameters.items() if isinstance(one, dict) and name in projections}
    elif place.get(_KEY) is not None:
        found = dict.fromkeys(projections, str(place[_KEY]))
    else:
        return None
    for layout in found.values():
        if layout not in (RANK_MAJOR, GROUPED_BY_EXPERT):
            raise UserError(
                f"{_KEY}: {layout[:100]!r}: the order of the columns of the experts' B must be {RANK_MAJOR} or {GROUPED_BY_EXPERT}"
            )
    return found
