"""Which linear layers an adapter in PEFT's format adapts: its `target_modules`, and the regular expressions in its description.

PEFT has either a list, of which each entry is the whole dotted name of a module or its end from a dot on, or one regular expression, which
the whole name must match (`check_target_module_exists` of PEFT 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hecate.errors import UserError
from hecate.model.linears import ends_of

Targets = tuple[str, ...] | str
"""names or their ends; or one regular expression"""

_COSTLY, _REPEATS = re.compile(r"\)[*+{]|\\[1-9]|\(\?P="), re.compile(r"[*+{]")
_NUMBERS = re.compile(r"(\\d|\[\\d\]|\[0-9\])([*+]|\{1,\})")
"""what matches the number of a layer, which has few digits"""
_LONGEST_PATTERN, _MOST_REPEATS = 10_000, 4


def require_sound(pattern: str, where: str) -> None:
    """Raises UserError: a regular expression is none, or is one of those that take years on some names.

    Those repeat what is itself repeated or a choice, or repeat often.

    Args:
        where: what the message names.
    """
    if len(pattern) > _LONGEST_PATTERN or _COSTLY.search(pattern) or len(_REPEATS.findall(_NUMBERS.sub("", pattern))) > _MOST_REPEATS:
        raise UserError(f"{where}: {pattern[:100]!r} repeats a group, or too much\n  give the names' ends themselves")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: {pattern[:100]!r} is no regular expression: {error}") from error


def adapts(targets: Targets, path: str) -> bool:
    """Return whether a linear of this dotted name is adapted."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return not ends_of(path).isdisjoint(targets)


def adapted_linears(targets: Targets, paths: Sequence[str], where: Path) -> list[str]:
    """Return which of a model's linears are adapted.

    Args:
        paths: the dotted names of all linears of its decoder layers.
        where: the adapter's folder, for the message.

    Raises:
        UserError: a target is for none of them.
    """
    if unknown := unknown_targets(targets, paths):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        raise UserError(f"{where}: adapts {', '.join(unknown[:5])}{more}, which is no linear of the base model's decoder layers: {known}")
    return [path for path in paths if adapts(targets, path)]


def unknown_targets(targets: Targets, paths: Sequence[str]) -> list[str]:
    """Return the targets that are for none of the linears."""
    if isinstance(targets, str):
        return [] if any(adapts(targets, path) for path in paths) else [targets]
    return sorted(set(targets) - _ends(paths))


def without_experts(targets: Targets, experts: Iterable[str], linears: Iterable[str]) -> Targets:
    """Return the targets without those that are for experts alone.

    Args:
        experts, linears: the dotted names of modules.
    """
    if isinstance(targets, str):
        return targets
    alone = _ends(experts) - _ends(linears)
    return tuple(target for target in targets if target not in alone)


def _ends(paths: Iterable[str]) -> set[str]:
    return {end for path in paths for end in ends_of(path)}


def listed(targets: Targets) -> list[str]:
    """Return the targets as a list: a regular expression is the only one."""
    return [targets] if isinstance(targets, str) else list(targets)
