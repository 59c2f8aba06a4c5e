"""What a job brings to the cluster: code and configurations of the working directory, and nothing else.

Files are taken by what they are, not left out by what they might be: a secret in a file of a kind that nobody thought of stays at home.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hecate.errors import UserError

SUFFIXES = (".py", ".yaml", ".yml", ".toml")
MAX_BYTES = 20 * 1024 * 1024
_LEFT_OUT = re.compile(r"(^|[._-])(secret|secrets|token|tokens|credential|credentials|password|passwords|private)([._-]|$)", re.IGNORECASE)
_FOLDERS_LEFT_OUT = re.compile(r"\..*|__pycache__|checkpoint-.*|runs|data|node_modules|venv|build|dist|.*\.egg-info")


def uploaded_files(root: Path) -> Iterator[Path]:
    """Paths below `root`, relative, sorted: Python, YAML and TOML files outside hidden folders, environments, data, runs and checkpoints,
    whose names do not speak of secrets. Links to folders are followed, once each."""
    seen: set[str] = set()
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        is_run = "metrics.jsonl" in files or "manifest.json" in files
        if real in seen and folder != str(root) and not os.path.islink(folder):
            folders.clear()
            continue
        seen.add(real)
        if is_run and folder != str(root):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not _FOLDERS_LEFT_OUT.fullmatch(name) and not _is_environment(Path(folder, name)))
        for name in files:
            if name.endswith(SUFFIXES) and not name.startswith(".") and not _LEFT_OUT.search(Path(name).stem):
                found.append(Path(folder, name).relative_to(root))
    yield from sorted(found)


def stage(root: Path, target: Path) -> int:
    """Copy what is uploaded of `root` into the empty folder `target`; returns its bytes.

    Raises:
        UserError: it is more than code would be.
    """
    total = 0
    for path in uploaded_files(root):
        total += (root / path).stat().st_size
        if total > MAX_BYTES:
            raise UserError(
                f"{root}: more than {MAX_BYTES >> 20} MiB of {', '.join(SUFFIXES)} files would be uploaded\n"
                "  start `hecate submit` in a folder that holds the configuration and the code that the job needs, no more"
            )
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target / path)
    return total


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists()
