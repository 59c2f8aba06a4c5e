"""A run needs none of root's rights."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from testing.processes import hecate
from testing.tiny_run import make_workshop

WITHOUT = ("setpriv", "--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all")
"""a command that runs another one without any capability, whoever starts it"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root's rights cannot be dropped here: there is no setpriv"
)
def test_a_run_needs_none_of_roots_rights(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path / "workshop")
    command = WITHOUT if os.geteuid() == 0 else ()
    arguments = ("train", str(workshop / "config.yaml"), f"output_dir={tmp_path}/run", "max_steps=2", "eval.generate=false")
    with hecate(*arguments, temporary=tmp_path / "tmp", command=command) as process:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert list((tmp_path / "tmp").iterdir()) == []
