"""Make virtual environments for peers whose requirements conflict with hecate's."""

import fcntl
import json
import logging
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from hecate.errors import UserError

logger = logging.getLogger(__name__)

_HOME = Path(__file__).resolve().parents[2] / ".venv-peers"


def peer_python(name: str, requirements: list[str], no_deps: list[str], *, beside_ours: bool = False) -> Path:
    """Return the python of the virtual environment `.venv-peers/NAME` of this checkout, which is made by the first call and kept.

    `requirements` are installed in one pip call, so that pip resolves them together, and `no_deps` after them without dependencies. An
    environment with other requirements, of another Python, or incomplete, is made again. Processes that call this for the same name at
    the same time wait for each other. Raises UserError if pip or venv fails.

    Args:
        beside_ours: whether the environment sees the packages of the one that runs this, too, behind its own. It then needs no torch.
    """
    assert re.fullmatch(r"[a-z0-9-]+", name), name
    _HOME.mkdir(exist_ok=True)
    (_HOME / ".gitignore").write_text("*\n")
    folder, made = _HOME / name, _HOME / f"{name}.json"
    python = folder / "bin" / "python"
    recipe = json.dumps({"python": sys.version, "requirements": requirements, "no_deps": no_deps, "ours": beside_ours}, indent=1)
    with (_HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if python.exists() and made.exists() and made.read_text() == recipe:
            return python
        made.unlink(missing_ok=True)
        logger.info("making %s: %s", folder, " ".join(requirements + no_deps))
        _run(name, [sys.executable, "-m", "venv", "--clear", str(folder)])
        if beside_ours:
            (site,) = folder.glob("lib/python*/site-packages")
            (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if requirements:
            _run(name, [*pip, *requirements])
        if no_deps:
            _run(name, [*pip, "--no-deps", *no_deps])
        # Written last: its presence says that the folder is complete.
        made.write_text(recipe)
    return python


def _run(name: str, command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return
    said = [line.strip()[:200] for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()] or said
    raise UserError(
        "\n".join(
            [
                f"the peer {name!r} could not be installed in {_HOME / name}",
                f"  failed (exit {done.returncode}): {' '.join(command)[:400]}",
                *(f"  {line}" for line in errors[-3:]),
                "  It needs PyPI once. Give this machine access to it (see `pip config list`), or run the rest without this peer.",
            ]
        )
    )
