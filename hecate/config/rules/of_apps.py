"""Have apps that bring a section of the configuration (`hecate.config.sections`) check it, and decide other keys by it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from hecate.config.problems import Add
from hecate.config.schema import Config
from hecate.config.sections import APPS, SETTINGS
from hecate.config.typed import Report


class SectionRules(Protocol):
    """The module `section.rules` of an app. Values are by dotted key, and typed; those with a problem are INVALID, or absent."""

    def derived(self, values: dict[str, Any], report: Report) -> dict[str, Any]:
        """Return the values with those of other keys that the section decides. Problems are added to the report."""

    def localised(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values after names on the hub have become paths, with these in the section, too."""

    def checked(self, values: Mapping[str, Any], add: Add) -> Mapping[str, Any]:
        """Add every problem of the section's keys, and return the values that the rules of other keys are to look at."""

    def require_one_training(self, config: Config) -> None:
        """Raises UserError: the configuration is of several trainings."""


def section_rules() -> list[SectionRules]:
    """The rules of each section that an app brings."""
    return [cast(SectionRules, import_module(f"{app}.section.rules")) for section, app in APPS.items() if section in SETTINGS]


def refuse_training(config: Config) -> None:
    """Raises UserError: the configuration is of several trainings, which one of the apps starts."""
    for rules in section_rules():
        rules.require_one_training(config)
