"""The sections of the configuration that apps bring, and optimizers: their keys. What goes together with those of apps is in
`hecate.config.rules.of_apps`.

An app is found by its name, as a front end is (`hecate.model.front_ends`), so where hecate is installed without it, its sections are
unknown. Each section is a package of its app. Its module `settings` has the section's dataclass, `SETTINGS`, and imports nothing of
`hecate.config` but `ranges`; its module `rules` has `RULES`. The file of an optimizer (`hecate.optim.rules`) that has keys of its own has
`SETTINGS` in the same way, and the section has its name.
"""

from __future__ import annotations

from dataclasses import field, make_dataclass
from importlib import import_module
from types import ModuleType

from hecate.io.registry import registered_names

APPS = {"rounds": "hecate.apps.federate.section", "privacy": "hecate.apps.federate.privacy"}
"""section -> the package of an app that brings it"""
IN_TRAININGS = ("privacy",)
"""those of them that add something to every training (`hecate.train.extensions.of_apps`)"""
_RULES = "hecate.optim.rules"
OPTIMIZERS = {
    name: import_module(f"{_RULES}.{name}") for name in registered_names(_RULES, ("adamw", "muon", "adamw_8bit", "adafactor", "lion"))
}
"""each value of `optim` -> its module"""


def _installed() -> dict[str, ModuleType]:
    found = {}
    for section, package in APPS.items():
        try:
            found[section] = import_module(f"{package}.settings")
        except ModuleNotFoundError as error:
            if error.name is None or not _app(section).startswith(error.name):
                raise
    return found | {name: module for name, module in OPTIMIZERS.items() if hasattr(module, "SETTINGS")}


def _app(section: str) -> str:
    return APPS[section].rpartition(".")[0]


SETTINGS = _installed()
"""section -> the module with its dataclass, of the apps that are installed and of optimizers"""


def with_sections(core: type) -> type:
    """Return the dataclass of a configuration with a field for each such section, after those of `core`."""
    brought = [(name, module.SETTINGS, field(default_factory=module.SETTINGS)) for name, module in SETTINGS.items()]
    return make_dataclass(core.__name__, brought, bases=(core,), frozen=True, kw_only=True, namespace={"__module__": core.__module__})


def missing_app(key: str) -> str:
    """Why a key is not known, where it is of an app that is not installed; "": it is not."""
    section = key.partition(".")[0]
    return f"this installation of hecate is without {_app(section)}" if section in APPS and section not in SETTINGS else ""
