"""What plan and simulate tell somebody who chooses a cluster, and that both give the same answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecate.apps.foresee.cases import Options, synthetic_cases
from hecate.apps.foresee.dry_run import fits, forecast
from hecate.apps.foresee.purchase import replication_line
from hecate.apps.foresee.report import print_rows
from hecate.cli import app
from hecate.config import load_config
from hecate.config.files.presets import base_named, run_presets
from hecate.errors import UserError
from hecate.model.sizes.run_shape import run_shape
from hecate.parallel.loops.jit import plain_python
from hecate.parallel.planners import POLICIES

RECIPES = {"qwen3-30b-a3b": "qwen3_30b_a3b", "mixtral-8x7b": "mixtral_8x7b"}


@pytest.mark.parametrize("topology", ["one-h100", "h100-node", "two-h100-nodes"])
@pytest.mark.parametrize("base", RECIPES)
def test_plan_and_simulate_give_one_answer(base: str, topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long run: where a copy of all experts fits, `auto` comes to it and is as fast, but for its first steps, which are in the mean of
    a thousand; where it does not, both say so."""
    two = ("full", "auto")
    monkeypatch.setattr("hecate.apps.foresee.dry_run.POLICIES", {name: POLICIES[name] for name in two})
    with plain_python():
        simulated = {row["policy"]: row for row in synthetic_cases(topology, base, ["zipf"], 8192)[0].run(Options(policies=two))}
        config = load_config(str(run_presets()[RECIPES[base]]), claim_output=False, inputs=False)
        found = forecast(run_shape(config, topology, None), "dirichlet_drift")
    planned = {one.policy: one for one in found.policies}
    fitting = fits(planned["full"], found.run)
    assert simulated["full"]["fits_memory"] == fitting == (base == "qwen3-30b-a3b")
    of_simulate = simulated["auto"]["step_seconds"] / simulated["full"]["step_seconds"]
    of_plan = planned["auto"].step_seconds / planned["full"].step_seconds
    if fitting or topology == "one-h100":
        assert of_simulate == pytest.approx(1, abs=0.02)
        assert of_plan == pytest.approx(1, abs=0.02)
    else:
        assert of_simulate > 1.02
        assert of_plan > 1.02


def test_plan_says_what_a_run_costs(tmp_path: Path) -> None:
    """By hand: 8 devices of 3 an hour for the time of the range."""
    arguments = ["plan", "qwen3_30b_a3b", "fssdp.policy=full", "--topology", "h100-node", "--price-per-hour", "3"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "plan.json")], catch_exceptions=False)
    shown, record = " ".join(result.output.split()), json.loads((tmp_path / "plan.json").read_text())
    seconds, bill = record["policies"][0]["step_seconds"], record["purchase"]
    tokens = 8 * 8 * 4096
    assert bill["tokens_per_step"] == tokens
    assert bill["step_seconds"] == pytest.approx([seconds * 600 / 459.5, seconds * 600 / 153])
    assert bill["tokens_per_second"] == pytest.approx([tokens / step for step in bill["step_seconds"][::-1]])
    assert bill["cost_of_run"] == pytest.approx([1000 * step * 8 * 3 / 3600 for step in bill["step_seconds"]])
    assert bill["cost_per_million_tokens"] == pytest.approx([1e6 * step * 8 * 3 / 3600 / tokens for step in bill["step_seconds"]])
    assert not bill["calibrated"]
    assert "s a step of 262,144 tokens" in shown
    assert "the run of 1,000 steps:" in shown
    assert "price of a million tokens:" in shown
    assert "uncalibrated: `hecate profile` has not run on these devices" in shown
    assert "replication is enough here: full, every expert on every device, fits" in shown
    assert "models/Qwen3-30B-A3B is not there: planned with the sizes of configs/bases/qwen3-30b-a3b.yaml" in shown


def test_without_price_and_length_plan_says_how_to_give_them() -> None:
    arguments = ["plan", "mixtral_8x7b", "num_train_epochs=2", "--topology", "one-h100"]
    shown = " ".join(CliRunner().invoke(app, arguments, catch_exceptions=False).output.split())
    assert "follow from num_train_epochs and the data, which are not read: give max_steps" in shown
    assert "prices: give --price-per-hour" in shown


def test_plain_lora_is_priced_without_a_policy() -> None:
    arguments = ["plan", "lora", "model.name_or_path=llama-3-8b", "data.train=x.jsonl", "max_steps=10", "--topology", "h100-node"]
    shown = " ".join(CliRunner().invoke(app, arguments, catch_exceptions=False).output.split())
    assert " h100-node: " in shown
    assert "auto on" not in shown
    assert "replication is enough" not in shown, "there are no experts"


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf"])
def test_a_price_is_a_positive_number(price: str) -> None:
    result = CliRunner().invoke(app, ["plan", "qwen3_30b_a3b", "--price-per-hour", price])
    assert isinstance(result.exception, UserError)
    assert "must be a positive number, what a device costs in an hour" in str(result.exception)


def test_whether_replication_is_enough() -> None:
    (line,) = replication_line({"full": 1.0, "auto": 1.0, "static_ep": 2.0}, 8)
    assert "takes 1.00 of the time of auto" in line
    assert replication_line({"full": 1.03, "auto": 1.0}, 8) == [], "it is slower"
    assert replication_line({"auto": 1.0}, 8) == [], "it does not fit"
    assert replication_line({"full": 1.0}, 8) == [], "nothing to compare with"
    assert replication_line({"full": 1.0, "auto": 1.0}, 1) == [], "one device has all experts anyway"


def test_simulate_explains_rows_and_ties(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(policies=("static_ep", "hecate_paper", "full"), steps=3)
    rows = []
    for topology in ("h100-node", "two-h100-nodes"):
        rows += synthetic_cases(topology, "mixtral-8x7b", ["zipf"], 8192, price_per_hour=3.0)[0].run(options)
    print_rows(rows)
    shown = " ".join(capsys.readouterr().out.split())
    assert "two-h100-nodes: times are 1.31 to 3.92 times those at the topology's rates; uncalibrated" in shown
    assert "mixtral-8x7b on two-h100-nodes, zipf: hecate_paper copies only experts that travel hidden" in shown


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("qwen3-30b-a3b", "qwen3-30b-a3b"),
        ("models/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("models/Meta-Llama-3-8B", "llama-3-8b"),
        ("models/mine", None),
        ("", None),
    ],
)
def test_a_base_has_the_names_that_people_use(name: str, stem: str | None) -> None:
    found = base_named(name)
    assert (None if found is None else found.stem) == stem


def test_simulate_sends_a_dense_base_to_plan() -> None:
    with pytest.raises(UserError, match=r"--model llama-3-8b: is a base without experts.*\n  hecate plan mixlora model\.name_or_path="):
        synthetic_cases("h100-node", "llama-3-8b", ["zipf"], 8192)
