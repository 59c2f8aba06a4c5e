"""The `hecate` command: its version and its help, and that a rank's program is not the command-line module."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from typer.testing import CliRunner

import hecate
from hecate.cli import app, forecasts, jobs
from hecate.cli.arguments import ConfigFile
from hecate.config.problems import ConfigError
from hecate.errors import UserError


def test_the_version_is_the_packages() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"hecate {hecate.__version__}\n")


def test_the_module_is_the_command() -> None:
    """`python -m hecate`, which is hecate.__main__."""
    done = subprocess.run([sys.executable, "-m", "hecate", "no-such-verb"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no-such-verb" in done.stderr


def test_verbs_that_take_a_configuration_show_it_alike() -> None:
    hints = {command.name: get_type_hints(command.callback, include_extras=True) for command in app.registered_commands}
    takers = [name for name, of_verb in hints.items() if ConfigFile in of_verb.values()]
    assert takers == ["train", "federate", "launch", "ray", "plan", "eval"]
    for name in takers:
        assert "{CONFIG} [KEY=VALUE]..." in CliRunner().invoke(app, [str(name), "--help"]).output


def test_a_key_with_signs_before_it_is_answered() -> None:
    done = CliRunner().invoke(app, ["train", "mixlora", "--max_steps=3", "--lora-r=8", "--nonsense"])
    assert isinstance(done.exception, ConfigError)
    said = {problem.key: problem.hint for problem in done.exception.problems if problem.source == "command line"}
    assert said == {
        "--max_steps": "write max_steps=... without signs before it",
        "--lora-r": "write lora.r",
        "--nonsense": "--help lists the options",
    }


def test_simulate_alone_lists_what_it_can_simulate() -> None:
    done = CliRunner().invoke(app, ["simulate"])
    assert isinstance(done.exception, UserError)
    needs, topologies, models = str(done.exception).splitlines()
    assert needs == "simulate needs --topology and --model, or --sweep FILE"
    assert topologies.startswith("  topologies: four-cpu-ranks, ")
    assert models.startswith("  models: bert-moe, ")


@pytest.mark.parametrize("program", [jobs.RANK_PROGRAM, forecasts.RANK_PROGRAM])
def test_a_rank_is_a_program_of_its_own(program: str) -> None:
    """With everything loaded that it needs, neither the command line nor a launcher is among it."""
    module = import_module(program)
    assert callable(module.preload)
    assert callable(module.main)
    code = f"import sys, {program} as program\nprogram.preload()\nprint(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "hecate.ranks.ranks" in loaded
    own = ("hecate.launch", program.rpartition(".")[0])
    others = [name for name in loaded if name not in own and not name.startswith(f"{own[1]}.")]
    assert not [name for name in others if name.startswith(("hecate.cli", "hecate.launch", "typer"))]


@pytest.mark.parametrize("program", [jobs.RANK_PROGRAM, forecasts.RANK_PROGRAM])
def test_a_rank_without_arguments_says_how_to_start_it(program: str) -> None:
    done = subprocess.run([sys.executable, "-m", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"python -m {program} " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate nothing hello", "chat nothing", "export nothing --out new"])
def test_a_folder_that_is_missing_is_named_before_libraries_are_loaded(command: str) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\nfrom typer.testing import CliRunner; from hecate.cli import app\n"
        "print(CliRunner().invoke(app, sys.argv[1:]).exception)"
    )
    done = subprocess.run([sys.executable, "-c", program, *command.split()], capture_output=True, text=True, check=True)
    assert done.stdout == "nothing: no such folder\n  give the folder of a run, a checkpoint, an adapter or a whole model\n"


def test_plan_leaves_the_environment_of_its_process_as_it_was(tmp_path: Path) -> None:
    """Who calls it in a process of his own has the planners' loops compiled afterwards, as before."""
    before = os.environ.get("NUMBA_DISABLE_JIT")
    done = CliRunner().invoke(app, ["plan", "mixlora", "model.name_or_path=llama-3-8b", f"output_dir={tmp_path}/run", "--ranks", "2"])
    assert done.exit_code == 0, done.output
    assert os.environ.get("NUMBA_DISABLE_JIT") == before
