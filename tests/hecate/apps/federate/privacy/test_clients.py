"""What rounds tell of their clients' samples."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecate.apps.federate.privacy.accountant import privacy_spent
from hecate.apps.federate.privacy.clients import check_rates, privacy_of_clients, samples_of_a_step
from hecate.cli import app
from hecate.config import Config, load_config
from hecate.errors import UserError
from testing.tiny_run import make_workshop

SAMPLES = {"up": 120, "echo": 30}
RECIPE = Path(__file__).parents[5] / "configs" / "recipes" / "ffa_rounds.yaml"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    clients = ",".join(f"{{data: {folder}/{name}.train.jsonl, name: {name}}}" for name in SAMPLES)
    changes = ["data.seq_len=64", "nproc=1", f"output_dir={folder}/out", "rounds.local_steps=5", f"rounds.clients=[{clients}]"]
    return [f"model.name_or_path={folder}/model", *changes]


@pytest.fixture(scope="module")
def recipe(overrides: list[str]) -> Config:
    return load_config(RECIPE, overrides)


def test_each_round_tells_more_by_the_share_of_a_clients_samples(recipe: Config) -> None:
    assert samples_of_a_step(recipe) == 4
    found = privacy_of_clients(recipe, SAMPLES, 3)
    for name, samples in SAMPLES.items():
        assert found[name] == privacy_spent(noise=0.5, delta=1e-5, samples=samples, samples_per_step=4, steps=15)
    assert found["echo"].epsilon > found["up"].epsilon > privacy_of_clients(recipe, SAMPLES, 2)["up"].epsilon > 0


def test_clients_that_begin_anew_begin_their_data_anew(recipe: Config) -> None:
    stacked = replace(recipe, rounds=replace(recipe.rounds, aggregate="stack", merge_into_base=True))
    found = privacy_of_clients(stacked, SAMPLES, 3)["up"]
    assert found == privacy_spent(noise=0.5, delta=1e-5, samples=120, samples_per_step=4, steps=5, runs=3)
    assert found.epsilon_any_order > privacy_of_clients(recipe, SAMPLES, 3)["up"].epsilon_any_order


def test_a_client_with_fewer_samples_than_a_step_is_refused(recipe: Config) -> None:
    check_rates(recipe, {"up": 4})
    with pytest.raises(UserError, match="a step takes 4 samples of up, which has 3"):
        check_rates(recipe, {"up": 3})


def test_without_noise_nothing_is_said(recipe: Config) -> None:
    assert privacy_of_clients(replace(recipe, privacy=replace(recipe.privacy, noise=0.0)), SAMPLES, 3) == {}


def test_on_ray_a_steps_samples_would_not_be_known(overrides: list[str]) -> None:
    done = CliRunner().invoke(app, ["federate", str(RECIPE), *overrides, "--address", "local"])
    assert "privacy.clip: is not supported with --address" in str(done.exception)
