"""No text out of somebody's file reaches a terminal as an order to it."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from hecate.cli import _command, app
from hecate.io.terminal import new_console, safe, safe_line, show_progress, show_text
from tests.terminal_orders import orders

TITLE, CLEAR, UP, RING, BACK, TURNED, EIGHT_BITS = "\x1b]0;owned\x07", "\x1b[2J", "\x1b[1A", "\x07", "\x08\r", "\u202egnp.exe", "\x9b2J"
HOSTILE = (TITLE, CLEAR, UP, RING, BACK, TURNED, EIGHT_BITS, "\x7f", "\x00")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_controls_are_shown_as_escapes(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert orders(hostile)
    show_text(f"a\n\tb {hostile} \u00fc\u6587")
    logging.getLogger("hecate").info(hostile)
    read = capsys.readouterr()
    assert orders(read.out + read.err) == []
    assert read.out.startswith("a\n\tb \\")
    assert read.out.endswith(" \u00fc\u6587\n")
    assert safe(hostile).isprintable()
    assert safe_line(f"{hostile}\n\t").isprintable()
    show_progress(hostile, "\n")
    assert orders(capsys.readouterr().err.removeprefix("\r\x1b[K")) == []


@pytest.mark.parametrize("hostile", HOSTILE)
def test_tables_and_panels_show_them_so_too(hostile: str) -> None:
    file = io.StringIO()
    console = new_console(file=file, width=200, force_terminal=False)
    table = Table(title=hostile)
    table.add_column(hostile)
    table.add_row(hostile)
    console.print(table)
    console.print(Text.assemble(hostile, ("x", "bold")), hostile, markup=False)
    assert orders(file.getvalue()) == []


def test_an_error_about_a_file_with_such_a_name_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name, a key in it, and a text that a library has put into its error."""
    file = tmp_path / f"{CLEAR}.yaml"
    file.write_text(f'"{TITLE}": 1\nlearning_rate: x\n'.replace(TITLE, "\\e]0;owned\\a"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["hecate", "train", str(file)])
    with pytest.raises(SystemExit) as ended:
        _command()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "learning_rate" in said.err
    assert orders(said.err + said.out) == []


def test_a_status_that_somebody_has_written_is_harmless(tmp_path: Path) -> None:
    made = {"state": "running", "ended": None, "detail": CLEAR, "notes": []}
    (tmp_path / "status.json").write_text(json.dumps(made), encoding="utf-8")
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert orders(result.output + str(result.exception).encode("unicode_escape").decode()) == []
