"""`hecate merge`: what it writes and says, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hecate.adapters.sets.by_peft import require_peft
from hecate.adapters.sets.lego import require_scikit_learn
from hecate.adapters.sets.merging import METHODS
from hecate.adapters.sets.set_files import read_set
from hecate.cli import app
from hecate.errors import UserError
from tests.hecate.adapters.exporting import LIMIT, hecate_logits, save_dense, save_mixlora, save_peft
from tests.hecate.adapters.making_sets import sums


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three adapters a, b and c, of ranks 4, 4 and 2; d is a mixture."""
    folder = tmp_path_factory.mktemp("merging")
    model = save_dense("llama", folder / "model")
    for number, (name, rank) in enumerate({"a": 4, "b": 4, "c": 2}.items()):
        adapter, _ = save_peft(folder / name, model, ["q_proj", "down_proj"], experts=False, r=rank, lora_alpha=2 * rank)
        file, random = adapter / "adapter_model.safetensors", torch.Generator().manual_seed(number)
        save_file({key: 0.3 * torch.randn(one.shape, generator=random) for key, one in sorted(load_file(file).items())}, file)
    save_mixlora(folder / "d", model)
    return folder


def run(*words: object) -> str:
    done = CliRunner().invoke(app, ["merge", *map(str, words)])
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_merge_says_what_it_is(workshop: Path, tmp_path: Path) -> None:
    adapters = [workshop / name for name in "abc"]
    said = run(*adapters, "--method", "stack", "--weights", "0.5,0.25,0.25", "-o", tmp_path / "all").splitlines()
    pairs = len(read_set(workshop / "a").sizes)
    assert said[0] == f"stack of 3 adapters with the weights 0.5, 0.25, 0.25, {pairs} pairs of rank 10, over {workshop / 'model'}"
    assert said[1].startswith("exact: the weighted sum to rounding, relative error ")
    before = sum((one / "adapter_model.safetensors").stat().st_size for one in adapters)
    assert said[2:] == [
        f"{before:,} bytes of weights became {(tmp_path / 'all/adapter_model.safetensors').stat().st_size:,}",
        f"wrote {tmp_path / 'all'}",
    ]
    found, (a, b, c) = sums(read_set(tmp_path / "all")), (sums(read_set(one)) for one in adapters)
    torch.testing.assert_close(found, 0.5 * a + 0.25 * b + 0.25 * c, rtol=1e-5, atol=1e-6)
    assert "| merge: method | stack |" in (tmp_path / "all/README.md").read_text()
    lego = run(*adapters, "--method", "lego", "--rank", 5, "--reweight", "parameter", "-o", tmp_path / "lego").splitlines()
    assert lego[1].startswith("not exact: relative error against the sum of the adapters 0.")
    assert json.loads((tmp_path / "lego/adapter_config.json").read_text())["hecate"]["extra"]["merged"]["reweight"] == "parameter"
    run(tmp_path / "all", "--method", "stack", "--rank", 3, "-o", tmp_path / "small")
    assert read_set(tmp_path / "small").rank == 3
    torch.testing.assert_close(hecate_logits(tmp_path / "all").isfinite().all(), torch.tensor(True), **LIMIT)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges(workshop: Path, tmp_path: Path, method: str) -> None:
    inexact = ["--inexact"] if method == "average" else []
    said = run(workshop / "a", workshop / "b", "--method", method, *inexact, "-o", tmp_path / "out")
    assert said.startswith(f"{method} of 2 adapters with the weights 0.5, 0.5, ")
    assert read_set(tmp_path / "out").rank == (8 if method == "stack" else 4)


def test_the_average_of_adapters_with_one_a_is_exact(workshop: Path, tmp_path: Path) -> None:
    """As runs with `lora.pairs: fixed_a` leave them."""
    shutil.copytree(workshop / "a", tmp_path / "other")
    file = tmp_path / "other/adapter_model.safetensors"
    save_file({key: one * (-1.5 if ".lora_B." in key else 1.0) for key, one in load_file(file).items()}, file)
    said = run(workshop / "a", tmp_path / "other", "--method", "average", "-o", tmp_path / "out").splitlines()
    assert said[1].startswith("exact: the weighted sum to rounding")
    torch.testing.assert_close(sums(read_set(tmp_path / "out")), -0.25 * sums(read_set(workshop / "a")), rtol=1e-5, atol=1e-6)


def test_the_adapters_of_a_runs_sources_are_merged(workshop: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(workshop / name, tmp_path / "run/adapters" / name)
    (tmp_path / "run/config.yaml").write_text("")
    assert "\nlego of 2 adapters" in run(tmp_path / "run", "--method", "lego", "-o", tmp_path / "out")
    assert read_set(tmp_path / "out").description.extra["merged"]["of"] == [str(tmp_path / "run/adapters" / name) for name in "ab"]


def test_a_mixture_gets_fewer_experts(workshop: Path, tmp_path: Path) -> None:
    said = run(workshop / "d", "--method", "lego", "--experts", 2, "--rank", 3, "-o", tmp_path / "out")
    assert "not exact: relative error against the adapter" in said
    assert "the routers' rows of experts that became one are means, which is not in the error" in said
    assert hecate_logits(tmp_path / "out").isfinite().all()


def test_another_base_model_is_refused_by_its_files(workshop: Path, tmp_path: Path) -> None:
    def over(model: Path) -> Path:
        adapter = tmp_path / f"over-{model.name}"
        shutil.copytree(workshop / "a", adapter)
        config = adapter / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(model)}))
        return adapter

    copied, other, missing = tmp_path / "copy", tmp_path / "other", tmp_path / "missing"
    shutil.copytree(workshop / "model", copied)
    save_dense("llama", other, hidden_act="gelu")
    run(workshop / "b", over(copied), "--method", "stack", "-o", tmp_path / "out")
    with pytest.raises(UserError, match=f"is for another base model than .*: {other} and {workshop / 'model'} have different weights"):
        run(workshop / "b", over(other), "--method", "stack", "-o", tmp_path / "new")
    with pytest.raises(UserError, match=r"(?s)is not known, because the base.*is not there\n.*--model PATH"):
        run(workshop / "b", over(missing), "--method", "stack", "-o", tmp_path / "new")
    run(workshop / "b", tmp_path / "over-missing", "--method", "stack", "--model", copied, "-o", tmp_path / "new")
    assert read_set(tmp_path / "new").description.base_model_name_or_path == str(copied)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("a b --method dare", "--method dare: there is no such method\n  methods: lego, stack, average, linear, ties, refine"),
        ("a b --method ties --rank 3", "--rank was given, which the method ties does not take\n  it is for lego, stack"),
        ("a b --method lego --ridge 3", "--ridge was given, which the method lego does not take\n  it is for refine"),
        ("a b --method stack --weights 1,x", "--weights 1,x: must be numbers separated by commas"),
        ("a b --method stack --weights 1,1", "have the sum 2, which must be 1"),
        ("a --method lego", "one adapter alone is what it is\n  name several, or give --rank or --experts"),
        ("a b --method lego --experts 2", "experts and 2 adapters were given.*\n  merge first, then shrink"),
        ("d --method lego --experts 2 --reweight none", "experts and reweight were given"),
        ("a b --method average", "the A of 2 adapters are not the same"),
        ("a c --method refine", "rank 2, but .* rank 4: refine .*\n  use stack"),
        ("a d --method stack", "adapters of different forms have no modules in common"),
        ("a model --method stack", "is a whole model, which cannot be read as an adapter\n  give the folder of an adapter"),
        ("a nothing --method stack", "nothing: no such folder"),
    ],
)
def test_what_cannot_be_merged_is_refused(workshop: Path, tmp_path: Path, words: str, reason: str) -> None:
    given = [str(workshop / word) if word in ("a", "b", "c", "d", "model", "nothing") else word for word in words.split()]
    with pytest.raises(UserError, match=f"(?s){reason}") as error:
        run(*given, "-o", tmp_path / "out")
    assert len(str(error.value).splitlines()) <= 8
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: exists already"):
        run(*given, "-o", tmp_path / "out") if "x" not in words else run("a", "--method", "lego", "-o", tmp_path / "out")


def test_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hecate.apps.answers.trained.is_checkpoint", lambda path: True)
    with pytest.raises(UserError, match=r"is a checkpoint, and adapters are merged\n  hecate export .* -o FOLDER makes one of it"):
        run(tmp_path / "checkpoint-3", "--method", "lego", "-o", tmp_path / "out")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for require, package in ((require_scikit_learn, "scikit-learn"), (require_peft, "peft")):
        with pytest.raises(UserError, match=rf"(?s)not installed\n  pip install {package}; or .*\[merge\]"):
            require()
