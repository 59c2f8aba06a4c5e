"""Chooses the files of the working directory that `hecate submit` uploads to the cluster: code, and the files that the configuration names.

A file is uploaded only if a rule names it. So a secret in a file that nobody thought of is not uploaded.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import hecate
from hecate.errors import UserError

SUFFIXES = (".py", ".yaml", ".yml", ".toml")
"""of the files that a configuration may name"""
MAX_BYTES = 20 * 1024 * 1024
_OF_PACKAGES = (".yaml", ".jinja")
"""beside Python, what Python packages hold: hecate's presets and chat templates"""
_SECRET = "secrets?|tokens?|credentials?|passwords?|private"
_LEFT_OUT = re.compile(rf"(^|[._-])({_SECRET})([._-]|$)", re.IGNORECASE)
_NO_CODE = re.compile(r"(^|[._-])(auth|keys?|api_?keys?|kubeconfig)([._-]|$)", re.IGNORECASE)
"""words in the names of files that are no code: a module called auth or keys is one"""
_FOLDERS_LEFT_OUT = re.compile(r"\..*|__pycache__|checkpoint-.*|runs|data|node_modules|venv|build|dist|.*\.egg-info")


def uploaded_files(root: Path, named: Collection[Path] = ()) -> list[Path]:
    """The files below `root` that are uploaded, as sorted relative paths.

    They are Python files, pyproject.toml, YAML and Jinja files inside Python packages, and the files that the configuration names; outside
    hidden folders, environments, data, runs and checkpoints, and without files whose names contain a word such as `secret` or `token`.
    Links are followed to what would be uploaded by its own path, too, so never out of `root`, and not back to a folder that contains them.

    Args:
        named: the configuration and the files that it names, relative to `root`.
    """
    top = os.path.realpath(root)
    return sorted({path.relative_to(root) for path in _below(root, (top,), top, {root / path for path in named}, False)})


def _below(folder: Path, above: tuple[str, ...], top: str, named: Collection[Path], in_package: bool) -> Iterator[Path]:
    """The uploaded files in a folder and below it.

    Args:
        above: the real paths of this folder and of the folders that contain it.
        top: the real path of the folder that is uploaded.
        in_package: whether the folder lies in a Python package.
    """
    in_package = in_package or (folder / "__init__.py").exists()
    for path in folder.iterdir():
        real = os.path.realpath(path)
        if not _is_open(path) or not _is_below(Path(real), Path(top)):
            continue
        if path.is_dir():
            if real not in above:
                yield from _below(path, (*above, real), top, named, in_package)
        elif path.is_file() and (path in named or _is_code(path, in_package)):
            yield path


def _is_code(path: Path, in_package: bool) -> bool:
    return path.suffix == ".py" or path.name == "pyproject.toml" or (in_package and path.suffix in _OF_PACKAGES)


def _is_below(real: Path, top: Path) -> bool:
    """Whether a real path lies in the real path `top`, and neither it nor a folder between the two is to be left out."""
    return real.is_relative_to(top) and all(map(_is_open, (real, *real.parents[: len(real.parts) - len(top.parts) - 1])))


def _is_open(path: Path) -> bool:
    """Whether a file or folder may be uploaded as far as its own name and content say."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return (_is_package(path) or not _FOLDERS_LEFT_OUT.fullmatch(path.name)) and not _is_left_out(path)
    if path.suffix != ".py" and _NO_CODE.search(path.stem):
        return False
    return _is_own(path) or not _LEFT_OUT.search(path.stem)


def stage(root: Path, target: Path, named: Collection[Path] = ()) -> str:
    """Copy the uploaded files of `root` into the empty folder `target`, and return a line that says which they are.

    Args:
        named: as for `uploaded_files`.

    Raises:
        UserError: they have more than `MAX_BYTES`, which is too much for code, or one that the configuration names is not among them.
    """
    total, taken = 0, uploaded_files(root, named)
    if missing := sorted(set(named) - set(taken)):
        raise UserError(
            f"{root / missing[0]}: the job needs this file, and it would not be uploaded: it is hidden, a link to elsewhere,\n"
            f"  or its name is that of a secret or of data; give it another name or place. Uploaded are {', '.join(SUFFIXES)} files."
        )
    for path in taken:
        total += (root / path).stat().st_size
        if total > MAX_BYTES:
            raise UserError(
                f"{root}: more than {MAX_BYTES >> 20} MiB of code would be uploaded\n"
                "  start `hecate submit` in a folder that holds only the configuration and the code that the job needs"
            )
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target / path)
    folders = Counter(path.parts[0] for path in taken if len(path.parts) > 1 and path not in named)
    alone = [str(path) for path in taken if len(path.parts) == 1 or path in named]
    names = ", ".join([*alone, *(f"{count} files of {name}/" for name, count in sorted(folders.items()))])
    return f"uploading {len(taken)} files, {-(-total // 1024)} KiB, from {root.resolve()}: {names}"


def _is_own(path: Path) -> bool:
    """Whether a file is a module of hecate: `token` in its name is a token of text."""
    package = Path(hecate.__file__).parent
    parts = {os.path.realpath(folder) for folder in (package, *(package / name for name in ("kernels", "launch", "parallel")))}
    return path.suffix == ".py" and any(os.fspath(parent) in parts for parent in Path(os.path.realpath(path)).parents)


def _is_package(folder: Path) -> bool:
    """Whether a folder is code whatever its name, such as hecate/data. Those of installed programs are in environments."""
    return (folder / "__init__.py").exists() and folder.name not in ("node_modules", "venv")


def _is_left_out(folder: Path) -> bool:
    """Whether a folder is an environment, a run or a checkpoint."""
    return any((folder / name).exists() for name in ("pyvenv.cfg", "metrics.jsonl", "manifest.json"))
