"""The distribution `hecate-moe`: its name, its version, how error texts say to install it, and its wheel, used outside the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import hecate
from hecate.errors import install_hint
from testing.tiny_run import STEPS, make_workshop
from tests.rooms import ALL_SOURCES, ROOT, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = [
    ROOT / "Makefile",
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "configs").rglob("*.yaml"),
    *(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".sh", ".sbatch", ".md", ".yaml")),
]


def test_every_file_of_configs_is_package_data() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["hecate.configs"]
    taken = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert taken == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert {path.suffix for path in taken} == {".yaml", ".jinja"}


def test_another_project_has_the_name_hecate_on_the_package_index() -> None:
    assert PROJECT["name"] == "hecate-moe"
    assert PROJECT["scripts"] == {"hecate": "hecate.cli:main"}
    assert PROJECT["optional-dependencies"]["quickstart"][-1] == "hecate-moe[report]"


def test_an_index_would_show_what_it_is() -> None:
    assert PROJECT["authors"]
    assert {f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13", "3.14")} <= set(PROJECT["classifiers"])
    assert PROJECT["requires-python"] == ">= 3.11"
    assert PROJECT["urls"]


def test_an_extra_leaves_out_what_has_no_wheel_for_a_python_and_nothing_else() -> None:
    marked = {text for extra in PROJECT["optional-dependencies"].values() for text in extra if "python_version" in text}
    assert marked == {"megatron-core >= 0.16.1, < 0.20; python_version < '3.14'"}
    assert not [text for text in PROJECT["dependencies"] if "python_version" in text]


HOLES = tomllib.loads((ROOT / "tests" / "known_holes.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", HOLES["least"])
def test_no_bound_admits_a_version_with_a_known_hole(package: str) -> None:
    given = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    bounds = [match[1] for text in given if (match := re.match(rf"{package}(?:\[\w+\])? >= ([0-9.]+)", text))]
    assert bounds, f"{package} is no dependency any more, or has no bound"

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    assert all(numbers(bound) >= numbers(HOLES["least"][package]) for bound in bounds), (package, bounds)


def python_of(folder: Path, name: str, version: tuple[int, int, int]) -> None:
    """A program that answers as a Python of this version: it computes nothing but conditions on `sys.version_info`."""
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info = {version}\n"
        "if sys.argv[1] != '-c':\n    sys.exit('this Python is to be asked for its version alone: ' + ' '.join(sys.argv[1:]))\n"
        "exec(sys.argv[2])\n"
    )
    program.chmod(0o755)


def made(folder: Path, *given: str) -> str:
    """What `make` says last with no other programs than those in the folder, and a shell. It must fail before it installs anything."""
    command = [shutil.which("make") or "make", "--no-print-directory", f"VENV={folder}/venv", *given]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert not (folder / "venv").exists()
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_python_that_is_too_old_is_refused_with_one_that_would_do(tmp_path: Path) -> None:
    """A name on PATH that starts nothing, as pyenv leaves for versions that are not chosen, would not do."""
    python_of(tmp_path, "python3", (3, 10, 12))
    needed = "hecate needs Python 3.11 or newer, and {}; {}"
    nowhere = "install one from https://www.python.org/downloads and name it: make PYTHON=/path/to/python3 install\n"
    assert made(tmp_path, "install") == needed.format("python3 is Python 3.10.12", nowhere)
    python_of(tmp_path, "python3.12", (3, 12, 1))
    python_of(tmp_path, "python3.11", (3, 11, 9))
    (tmp_path / "python3.14").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python3.14").chmod(0o755)
    there = "python3.12 on PATH would do: make PYTHON=python3.12 test\n"
    assert made(tmp_path, "test") == needed.format("python3 is Python 3.10.12", there)
    assert made(tmp_path, "test", "PYTHON=none") == needed.format("none is no program that starts", there)
    python_of(tmp_path, "python3", (3, 15, 0))
    assert "hecate needs" not in made(tmp_path, "install")


def test_nothing_says_to_install_that_project() -> None:
    named = re.compile(r"pip install[^\n]*?['\" ]hecate(-moe)?(\[|['\"]| |$)", re.MULTILINE)
    wrong = [str(path) for path in [*ALL_SOURCES, *PAGES] if named.search(path.read_text(encoding="utf-8"))]
    assert not wrong, f"hecate is installed from its checkout or its wheel: {wrong}"


def test_every_extra_that_an_error_names_is_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sources("hecate", "parallel", "kernels", "launch")]
    named = {extra for text in texts for extra in re.findall(r"install_hint\(['\"](\w+)['\"]\)", text)}
    assert {"ray", "megatron", "report"} <= named <= set(PROJECT["optional-dependencies"])
    assert "pip install '.[ray]'" in install_hint("ray")
    assert len(install_hint("megatron")) <= 140
    (alone,) = re.findall(r"pip install --quiet --no-deps (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    names = re.findall(r"(?<![<>=.\d] )\b[a-z][\w-]+", alone)
    assert install_hint("quickstart").endswith(f"; then: pip install --no-deps {' '.join(names)}"), "as make installs them"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy of the checkout: setuptools would leave a folder in it, and take what an earlier build left there."""
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: os.path.lexists(ROOT / name), listed.splitlines()):
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "checkout" / name, follow_symlinks=False)
    isolation = [] if importlib.util.find_spec("setuptools") is None else ["--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", str(folder), str(folder / "checkout")]
    subprocess.run(command, check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a program of an environment that has the wheel, and takes what the wheel needs from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Folders that such a file adds come after the environment's own, and their own .pth files, as of an editable install, are not read.
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    # Compiling the planners' loops anew, as an installation does once, would be most of the test.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"NUMBA_DISABLE_JIT": "1"}

    def run(program: str, *arguments: str, cwd: Path) -> str:
        command = [str(folder / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.mark.slow
def test_the_wheel_trains_plans_and_simulates_outside_the_checkout(installed: Callable[..., str], wheel: Path, tmp_path: Path) -> None:
    assert wheel.name == f"hecate_moe-{hecate.__version__}-py3-none-any.whl"
    assert wheel.name in install_hint("ray")
    where = "import hecate, importlib.metadata as m; print(hecate.__file__, m.version('hecate-moe'))"
    file, version = installed("python", "-c", where, cwd=tmp_path).split()
    assert "site-packages" in file
    assert not file.startswith((str(ROOT), sysconfig.get_path("purelib")))
    assert version == hecate.__version__
    assert installed("hecate", "--version", cwd=tmp_path) == f"hecate {hecate.__version__}\n"

    make_workshop(tmp_path)
    shown = installed("hecate", "train", "config.yaml", "nproc=2", "output_dir=runs/installed", cwd=tmp_path)
    assert f"step {STEPS}/{STEPS}" in shown
    assert (tmp_path / "runs" / "installed" / "adapter").is_dir()
    assert "One step on h100-node" in installed("hecate", "plan", "config.yaml", "--topology", "h100-node", cwd=tmp_path)
    case = ["--topology", "two-cpu-ranks", "--model", "gpt-moe-s", "--policy", "static_ep,hecate", "--steps", "2"]
    installed("hecate", "simulate", *case, "--json", "simulated.json", cwd=tmp_path)
    assert json.loads((tmp_path / "simulated.json").read_text(encoding="utf-8"))
