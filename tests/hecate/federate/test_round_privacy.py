"""What rounds tell of their clients' samples."""

from dataclasses import replace
from pathlib import Path

import pytest

from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.federate.privacy import check_rates, privacy_of_clients, samples_of_a_step
from hecate.train.privacy_accountant import privacy_spent
from testing.tiny_run import make_workshop

SAMPLES = {"up": 120, "echo": 30}
RECIPE = Path(__file__).parents[3] / "configs" / "recipes" / "ffa_rounds.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    clients = ",".join(f"{{data: {folder}/{name}.train.jsonl, name: {name}}}" for name in SAMPLES)
    changes = ["data.seq_len=64", "nproc=1", f"output_dir={folder}/out", "rounds.local_steps=5", f"rounds.clients=[{clients}]"]
    return load_config(RECIPE, [f"model.name_or_path={folder}/model", *changes])


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
