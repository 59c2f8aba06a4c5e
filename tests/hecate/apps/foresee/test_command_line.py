"""The commands `plan` and `simulate` as a user calls them: what they print and refuse, and that they import no torch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecate.apps.foresee.cases import Options, synthetic_cases
from hecate.apps.foresee.simulate import Shown, run_cases
from hecate.cli import app
from hecate.errors import UserError
from tests.hecate.apps.foresee.making import CONFIG, write_model

SMALL = ("--topology", "two-cpu-ranks", "--tokens", "64", "--steps", "2", "--policy", "static_ep,full", "--model")
MODEL = "{kind: full, hidden: 8, ffn: 16, layers: 2, seq: 8, experts: 4, top_k: 2}"


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(MODEL)
    return str(path)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UserError), result.exception
    assert len(str(result.exception).splitlines()) <= 8
    return str(result.exception)


def test_simulate(model: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", *SMALL, model, "--json", str(tmp_path / "rows.json")], catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["settings"]["policies"] == ["static_ep", "full"]
    assert record["settings"]["execution"] == {
        "plan": "history",
        "rematerialize": False,
        "prefetch": 1,
        "micro_steps": 1,
        "route": "fastest",
    }
    assert [row["workload"] for row in record["rows"]] == ["zipf", "zipf"]


def test_simulate_chooses_the_mode_of_each_layer(model: str, tmp_path: Path) -> None:
    """And names rows such as llep+ours."""
    arguments = ["simulate", *SMALL, model, "--plan", "auto", "--policy", "llep,llep+ours", "--json", str(tmp_path / "rows.json")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "From which loads layers were planned" in result.output
    record = json.loads((tmp_path / "rows.json").read_text())
    assert (record["settings"]["choose_modes"], record["settings"]["execution"]["plan"]) == (["calibrated", "history", "exact"], "history")
    assert [row["policy"] for row in record["rows"]] == ["llep", "llep+ours"]
    assert all(set(row["plan_modes"]) == {"history", "calibrated", "exact"} for row in record["rows"])
    assert refused("simulate", *SMALL, model, "--plan", "late").startswith(
        "--plan must be one of history, calibrated, exact, replay, auto, "
    )


def test_simulate_a_sweep(model: str, tmp_path: Path) -> None:
    run = f"{{topologies: two-cpu-ranks, models: {model}, workloads: [zipf, burst], tokens_per_rank: 8}}"
    (tmp_path / "sweep.yaml").write_text(f"{{steps: 2, policies: full, runs: [{run}]}}")
    arguments = ["simulate", "--sweep", str(tmp_path / "sweep.yaml"), "--json", str(tmp_path / "rows.json")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert [row["workload"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["zipf", "burst"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("live", [False, True])
def test_simulate_shows_that_it_lives(model: str, live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal one line that tells case and policy and is gone at the end; elsewhere a line a case."""
    shown = Terminal() if live else io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    options = Options(policies=("static_ep", "full"), steps=2)
    run_cases(synthetic_cases("two-cpu-ranks", model, ["zipf", "burst"], 8), options, Shown(wide=False))
    cases = ["1/2 small on two-cpu-ranks, zipf", "2/2 small on two-cpu-ranks, burst"]
    if live:
        assert [line.removeprefix("\x1b[K") for line in shown.getvalue().split("\r")] == [
            "",
            *(f"{case}: {policy}" for case in cases for policy in ("static_ep", "full")),
            "",
        ]
    else:
        assert shown.getvalue().splitlines() == cases
    assert "Speed-up" in capsys.readouterr().out


def test_what_simulate_refuses(model: str) -> None:
    assert "needs --topology and --model, or --sweep FILE" in refused("simulate")
    assert "needs --model, or" in refused("simulate", "--topology", "h100-node")
    for price in ("free", "0", "-1", "nan", "inf", "1,2,3", ""):
        said = refused("simulate", "--topology", "h100-node,h200-node", "--model", model, "--price-per-hour", price)
        assert "must be a positive number" in said
        assert "of which there are 2" in said
    assert "two are called h100-node" in refused("simulate", "--topology", "h100-node,h100-node", "--model", model)
    assert "topology nowhere: no such preset" in refused("simulate", "--topology", "nowhere", "--model", model)
    assert "--policy: unknown: best" in refused("simulate", "--topology", "h100-node", "--model", model, "--policy", "best")
    assert "leave out --model, --steps" in refused("simulate", "--sweep", "paper", "--model", model, "--steps", "3")
    assert "leave out --workload" in refused("simulate", "--trace", "x", "--workload", "zipf", *SMALL[:2], "--model", model)
    assert "sweep papers: no such preset\n  use one of paper" in refused("simulate", "--sweep", "papers")


def test_a_table_of_clusters_cuts_off_nothing_at_eighty_columns() -> None:
    given = ["--topology", "one-h100,h100-node", "--model", "qwen3-30b-a3b", "--price-per-hour", "3,3", "--policy", "full", "--steps", "1"]
    shown = CliRunner().invoke(app, ["simulate", *given], catch_exceptions=False, env={"COLUMNS": "80"}).stdout
    assert "ms a step" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("uncalibrated") == 1, "one note for clusters of one card"


def test_a_dry_run_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, dtype="auto"))
    code = (
        f"import atexit, sys; sys.argv = ['hecate', 'plan', {str(config)!r}, 'moe.num_experts=2', '--topology', 'two-cpu-ranks']\n"
        "atexit.register(lambda: print('loaded:', sorted({'torch', 'transformers'} & set(sys.modules))))\n"
        "from hecate.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "140"}, timeout=120
    )
    assert "Memory of rank 0" in done.stdout
    assert "One step on two-cpu-ranks, 2 ranks" in done.stdout
    assert done.stdout.strip().endswith("loaded: []")
    assert not (tmp_path / "out").exists()
