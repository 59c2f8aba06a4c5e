"""Modules that lie in the working directory, perhaps beside the data, are not code of hecate's: none of its processes imports them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hecate.io.python_module import RUN_MODULE
from testing.tiny_run import make_workshop

STAND_INS = ["json", "yaml", "numpy", "select", "random", "logging", "tempfile", "torch", "transformers", "omegaconf", "safetensors"]
SAYS = """import sys
with open({place!r}, "a") as file:
    file.write(f"{{__name__}} {{sys.orig_argv}}\\n")
raise ImportError("a stand-in was imported")
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def run_beside(names: Sequence[str], folder: Path, *command: str) -> None:
    """Run a command in a folder with modules of these names, and require that it succeeds and that nobody has imported them."""
    imported = folder / "imported"
    for name in names:
        (folder / f"{name}.py").write_text(SAYS.format(place=str(imported)), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    environment |= {"OMP_NUM_THREADS": "1", "HECATE_CACHE": str(folder / "tokens")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert not imported.exists(), imported.read_text(encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("start", [pytest.param("-m", marks=pytest.mark.slow), "script"])
def test_a_training_imports_none_of_them(workshop: Path, tmp_path: Path, start: str) -> None:
    """The command, the process that ranks are forked from, and the ranks. A `hecate.py` is another program for `python -m hecate`; for the
    script it is one more stand-in."""
    small = ("max_steps=2", "eval.on_start=false", "eval.generate=false", "data.eval=[]", "nproc=2", f"output_dir={tmp_path}/run")
    command = [sys.executable, "-m", "hecate"] if start == "-m" else [str(Path(sys.executable).with_name("hecate"))]
    names = STAND_INS if start == "-m" else (*STAND_INS, "hecate")
    run_beside(names, tmp_path, *command, "train", str(workshop / "config.yaml"), *small)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
def test_a_training_on_ray_imports_none_of_them(workshop: Path, tmp_path: Path) -> None:
    small = ("max_steps=2", "eval.on_start=false", "eval.generate=false", "data.eval=[]", "ray.workers=1", f"output_dir={tmp_path}/run")
    run_beside(STAND_INS, tmp_path, *RUN_MODULE, "hecate", "ray", str(workshop / "config.yaml"), *small, "--address", "local")


def test_a_module_of_hecates_is_started_without_them(tmp_path: Path) -> None:
    run_beside((*STAND_INS, "hecate", "runpy"), tmp_path, *RUN_MODULE, "hecate", "train", "--help")
