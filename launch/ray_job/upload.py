"""Chooses the files of the working directory that `hecate submit` uploads to the cluster: code and configurations, and nothing else.

A file is uploaded only if its kind is on a list. So a secret in a file of a kind that nobody thought of is not uploaded.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import hecate
from hecate.errors import UserError

SUFFIXES = (".py", ".yaml", ".yml", ".toml")
MAX_BYTES = 20 * 1024 * 1024
_LEFT_OUT = re.compile(r"(^|[._-])(secret|secrets|token|tokens|credential|credentials|password|passwords|private)([._-]|$)", re.IGNORECASE)
_FOLDERS_LEFT_OUT = re.compile(r"\..*|__pycache__|checkpoint-.*|runs|data|node_modules|venv|build|dist|.*\.egg-info")


def uploaded_files(root: Path) -> list[Path]:
    """The files below `root` that are uploaded, as sorted relative paths.

    They are the Python, YAML and TOML files outside hidden folders, environments, data, runs and checkpoints, except files whose names
    contain a word such as `secret` or `token`. Links to folders are followed, unless they lead back to a folder that contains them.
    """
    return sorted(path.relative_to(root) for path in _below(root, (os.path.realpath(root),)))


def _below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """The uploaded files in a folder and below it.

    Args:
        above: the real paths of this folder and of the folders that contain it.
    """
    for path in folder.iterdir():
        real = os.path.realpath(path)
        if path.is_dir():
            if (_is_package(path) or not _FOLDERS_LEFT_OUT.fullmatch(path.name)) and not _is_left_out(path) and real not in above:
                yield from _below(path, (*above, real))
        elif path.suffix in SUFFIXES and not path.name.startswith(".") and (_is_own(real) or not _LEFT_OUT.search(path.stem)):
            yield path


def stage(root: Path, target: Path) -> int:
    """Copy the uploaded files of `root` into the empty folder `target`, and return their size in bytes.

    Raises:
        UserError: they have more than `MAX_BYTES`, which is too much for code.
    """
    total = 0
    for path in uploaded_files(root):
        total += (root / path).stat().st_size
        if total > MAX_BYTES:
            raise UserError(
                f"{root}: more than {MAX_BYTES >> 20} MiB of {', '.join(SUFFIXES)} files would be uploaded\n"
                "  start `hecate submit` in a folder that holds only the configuration and the code that the job needs"
            )
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target / path)
    return total


def _is_own(real: str) -> bool:
    """Whether a file is a module of hecate: `token` in its name is a token of text."""
    return real.endswith(".py") and real.startswith(os.path.realpath(os.path.dirname(hecate.__file__)) + os.sep)


def _is_package(folder: Path) -> bool:
    """Whether a folder is code whatever its name, such as hecate/data. Those of installed programs are in environments."""
    return (folder / "__init__.py").exists() and not folder.name.startswith(".") and folder.name not in ("node_modules", "venv")


def _is_left_out(folder: Path) -> bool:
    """Whether a folder is an environment, a run or a checkpoint."""
    return any((folder / name).exists() for name in ("pyvenv.cfg", "metrics.jsonl", "manifest.json"))
