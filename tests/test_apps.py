"""Each app can be deleted: nothing but the command line and its own tests needs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from hecate.config import load_config
from hecate.config.rules.of_apps import SectionRules
from hecate.config.sections import APPS as SECTIONS_OF_APPS
from hecate.config.sections import IN_TRAININGS, OPTIMIZERS, SETTINGS
from hecate.train.extensions.of_apps import training_additions
from testing.tiny_run import make_workshop
from tests.rooms import ROOT, imports_of_modules, modules, under

APPS = sorted(path.name for path in (ROOT / "hecate" / "apps").iterdir() if (path / "__init__.py").is_file())


@pytest.mark.parametrize("app", APPS)
def test_nothing_but_the_command_line_imports_an_app(app: str) -> None:
    own = f"hecate.apps.{app}"
    needing = {
        name: sorted(other for other in others if under(other, own))
        for name, others in imports_of_modules().items()
        if not under(name, own, "hecate.cli") and any(under(other, own) for other in others)
    }
    assert not needing


def test_sections_of_the_configuration_are_those_of_their_apps() -> None:
    assert [section for section in SETTINGS if section not in OPTIMIZERS] == list(SECTIONS_OF_APPS)
    for section, package in SECTIONS_OF_APPS.items():
        assert SETTINGS[section].__name__ == f"{package}.settings"
        assert isinstance(import_module(f"{package}.rules").RULES, SectionRules)
        assert (f"{package}.training" in modules()) is (section in IN_TRAININGS)


def test_a_training_imports_only_what_sections_that_are_given_add(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path)
    config = load_config(workshop / "config.yaml", claim_output=False)
    assert training_additions(config) == []
    given: Any = config
    given = replace(config, privacy=replace(given.privacy, clip=1.0))
    assert [type(one).__name__ for one in training_additions(given)] == ["PrivateTraining"]


WITHOUT = """
import importlib.util, runpy, sys
# That of an editable installation would find the apps in the checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
assert importlib.util.find_spec("hecate").origin.startswith(sys.argv[1]) and importlib.util.find_spec("hecate.apps") is None
"""


def test_a_run_without_any_app(tmp_path: Path) -> None:
    """A copy of hecate without them trains, and refuses a front end and keys that are not there."""
    where = tmp_path / "whole"
    shutil.copytree(ROOT / "hecate", where / "hecate", ignore=shutil.ignore_patterns("apps", "__pycache__"))
    workshop = make_workshop(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"}

    def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT + code, *arguments]
        return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=240, check=False)

    train = "del sys.argv[1]; runpy.run_module('hecate.train.rank_main', run_name='__main__', alter_sys=True)"
    done = python(train, str(where), str(workshop / "config.yaml"), f"output_dir={tmp_path}/run", "eval.generate=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "adapter").is_dir()
    refused = python("from hecate.model.front_ends import other_front_end; other_front_end('megatron')", str(where))
    assert "model.front_end=megatron: this installation of hecate is without it" in refused.stderr
    for key in ("rounds.count", "privacy.clip"):
        refused = python(train, str(where), str(workshop / "config.yaml"), f"{key}=2")
        assert refused.returncode == 2
        assert f"{key}: unknown key\n    hint: this installation of hecate is without hecate.apps.federate" in refused.stderr
