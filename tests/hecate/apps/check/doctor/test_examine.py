"""All checks together (the verb of `hecate.cli.machine`): the table, the exit status, JSON, the inputs of a run, and several ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hecate.apps.check.doctor import examine
from hecate.apps.check.doctor.finding import Finding, by_name, ok, problem, warning
from hecate.apps.check.doctor.run_inputs import checks_of
from hecate.apps.check.doctor.several_ranks import clocks_finding, findings_of_all, versions_finding
from hecate.cli import app
from hecate.config import load_config
from hecate.parallel.cluster.mesh import make_mesh
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop


def test_this_machine_trains_and_so_it_is_healthy() -> None:
    assert len(examine.CHECKS) >= 25
    done = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(done.output)
    assert {name: of["what"] for name, of in found["checks"].items() if of["state"] == "problem"} == {}
    assert (found["healthy"], done.exit_code) == (True, 0)
    assert list(found["checks"]) == list(examine.CHECKS)


def test_a_problem_is_shown_with_its_mend_and_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_size() -> Finding:
        return problem("too small\nby far", "take a larger one")

    def unmade() -> Finding:
        raise KeyError("nothing")

    def slow_link() -> Finding:
        return warning("slow", "plug it in")

    monkeypatch.setattr(examine, "CHECKS", by_name(wrong_size, unmade, slow_link))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert done.output.splitlines()[:-1] == [
        "problem  wrong size  too small",
        "                     by far",
        "                     -> take a larger one",
        "problem  unmade      the check failed with KeyError: 'nothing'",
        "                     -> report it",
        "warning  slow link   slow",
        "                     -> plug it in",
    ]
    assert done.output.splitlines()[-1].endswith(": 3 checks: 1 warning, 2 problem")


def test_the_inputs_of_a_run_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_workshop(tmp_path)

    def found() -> dict[str, Finding]:
        return examine.examine(
            checks_of(lambda: load_config(folder / "config.yaml", [f"output_dir={folder}/runs/new"], claim_output=False))
        )

    assert {name: finding.state for name, finding in found().items()} == dict.fromkeys(
        ("configuration", "model", "data", "kernels and attention", "packages", "output folder"), "ok"
    )
    kept = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(f"{kept}report_to: [wandb]\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    wandb = found()["packages"]
    assert (wandb.state, wandb.what) == ("problem", "report_to: wandb: not installed")
    assert "pip install" in wandb.mend
    (folder / "config.yaml").write_text(kept, encoding="utf-8")
    index = folder / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}), encoding="utf-8")
    assert found()["model"].what.endswith("1 of 2 files of weights are missing, such as model-2.safetensors")
    (folder / "up.train.jsonl").write_text("no json\n", encoding="utf-8")
    assert found()["data"].state == "problem"
    (folder / "config.yaml").write_text("lora_r: 8\n", encoding="utf-8")
    assert list(found()) == ["configuration"]
    assert "write lora.r" in found()["configuration"].what


def test_versions_and_clocks_of_several_ranks() -> None:
    same = {"torch": "2.13", "numpy": "2.4"}
    assert versions_finding(["a", "b"], [same, same]) == ok("2 ranks have the same")
    other = versions_finding(["a", "b"], [same, {"torch": "2.12"}])
    assert other.what == "torch: 2.13 on a, 2.12 on b; numpy: 2.4 on a, missing on b"
    of_one_name = versions_finding(["localhost"] * 3, [{"torch": version} for version in ("2.12", "2.13", "2.13")])
    assert of_one_name.what == "torch: 2.12 on localhost, 2.13 on localhost"
    assert clocks_finding(["a", "b"], [100.0, 101.5]) == ok("within 1.5 s")
    assert clocks_finding(["a", "b"], [100.0, 160.0]).what == "b is 60 s before a"


def test_what_another_rank_lacks_is_shown_by_the_first() -> None:
    first, second = run_ranks(2, _of_rank)
    assert [name for name in first if name.startswith("disk")] == ["disk", first_of_rank_1(first)]
    assert first[first_of_rank_1(first)] == ("problem", "full on 1")
    assert first["versions of ranks"][0] == first["clocks of ranks"][0] == "ok"
    assert [name for name in second if name.startswith("disk")] == ["disk"]


def first_of_rank_1(found: dict[str, tuple[str, str]]) -> str:
    return next(name for name in found if name.startswith("disk of rank 1 on "))


def _of_rank(rank: int, world: int) -> dict[str, tuple[str, str]]:
    ranks = Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world)))
    own = {"disk": problem(f"full on {rank}", "") if rank else ok("")}
    return {name: (finding.state, finding.what) for name, finding in findings_of_all(own, ranks).items()}
