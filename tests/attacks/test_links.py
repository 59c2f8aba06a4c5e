"""No command writes through a link that lies in a run's folder: who left it there would choose the file that is written over."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecate.cli import app
from hecate.errors import UserError
from tests.hecate.apps.megatron.making import write_parts

NAMES = ("report.html", "metrics.jsonl", "adapter", "checkpoint-9", "tensorboard", "loads", "config.yaml")


@pytest.mark.parametrize("command", ["report", "train", "launch", "export"])
def test_a_link_in_a_runs_folder_is_refused(tmp_path: Path, command: str) -> None:
    write_parts(tmp_path)
    run, precious = tmp_path / "runs" / "a", tmp_path / "precious"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    (run / "config.yaml").touch()
    precious.write_text("as it was", encoding="utf-8")
    for name in NAMES:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious)
        given = {"report": [str(run)], "export": [str(run), str(tmp_path / "out")]}.get(
            command, [str(tmp_path / "config.yaml"), f"output_dir={run}", "resume=true"]
        )
        result = CliRunner().invoke(app, [command, *given])
        assert isinstance(result.exception, UserError), result.exception
        assert f"{name!r} is a link; in a run's folder hecate follows none" in str(result.exception)
        assert precious.read_text(encoding="utf-8") == "as it was"
        (run / name).unlink()
