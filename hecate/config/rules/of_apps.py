"""Have apps that bring a section of the configuration (`hecate.config.sections`) check it, and decide other keys by it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hecate.config.problems import Add
from hecate.config.schema import Config
from hecate.config.sections import APPS, SETTINGS
from hecate.config.typed import Report


class SectionRules:
    """`RULES` of a section's module `rules`; by default no rule. Values are by dotted key, and typed; those with a problem are INVALID, or
    absent."""

    def derived(self, values: dict[str, Any], report: Report) -> dict[str, Any]:
        """Return the values with those of other keys that the section decides. Problems are added to the report."""
        return values

    def localised(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values after names on the hub have become paths, with these in the section, too."""
        return values

    def checked(self, values: Mapping[str, Any], add: Add) -> Mapping[str, Any]:
        """Add every problem of the section's keys, and return the values that the rules of other keys are to look at."""
        return values

    def require_one_training(self, config: Config) -> None:
        """Raises UserError: the configuration is of several trainings."""

    def require_packages(self, config: Config) -> None:
        """Raises UserError: this machine lacks a package that the section needs."""

    def single_sequences(self, config: Config) -> bool:
        """Whether each sequence of a micro-batch must be a forward and backward pass of its own."""
        return False


def section_rules() -> list[SectionRules]:
    """The rules of each section that an app brings."""
    return [import_module(f"{package}.rules").RULES for section, package in APPS.items() if section in SETTINGS]


def refuse_training(config: Config) -> None:
    """Raises UserError: the configuration is of several trainings, which one of the apps starts."""
    for rules in section_rules():
        rules.require_one_training(config)


def require_packages(config: Config) -> None:
    """Raises UserError: this machine lacks a package that a section of the configuration needs."""
    for rules in section_rules():
        rules.require_packages(config)


def single_sequences(config: Config) -> bool:
    """Whether each sequence of a micro-batch must be a forward and backward pass of its own."""
    return any(rules.single_sequences(config) for rules in section_rules())
