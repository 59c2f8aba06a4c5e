"""Clients that are trained at once are trained as if each were alone; one client is an ordinary run. In float64, without processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecate.adapters.peft.reading import load_lora
from hecate.apps.federate.base import vector_shape
from hecate.apps.federate.before_round import send_down, server_before
from hecate.apps.federate.client import ClientPlan, receive, send, write_message
from hecate.apps.federate.codec import decode, encode
from hecate.apps.federate.plans import client_plan, configs_of, processes_of, round_folder, trained_together
from hecate.apps.federate.vectors import flat, pairs_of, read_pairs
from hecate.config import Config
from hecate.errors import UserError
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.apps.federate.making import UNEQUAL, recipe
from tests.hecate.train.in_process import ranks_of_default_group

LIMIT = {"rtol": 0.0, "atol": 1e-10}
POLICIES = ("hecate_paper", "static_ep")
CASES = {"average": (), "unequal ranks": (UNEQUAL,), "fixed A": ("lora.pairs=fixed_a",), "dropout": ("lora.dropout=0.2",)}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def plans_of(config: Config, number: int = 1) -> dict[str, ClientPlan]:
    """The plans of a round's clients, whose messages down are written: of an adapter whose B is not zero."""
    shape = vector_shape(config)
    server = server_before(config, shape, number, [])
    assert server.pairs is not None
    random = torch.Generator().manual_seed(0)
    trained = {path: (a, 0.1 * torch.randn(b.shape, generator=random, dtype=b.dtype)) for path, (a, b) in server.pairs.items()}
    server = replace(server, pairs=trained)
    plans = {one.name: client_plan(config, shape, one, number, server.stacked) for one in config.rounds.clients}
    send_down(config, number, server, plans)
    return plans


def train(rank: int, world: int, config: Config) -> None:
    """A training from its beginning to what it leaves; the ranks of a process group that is there."""
    run = Training(config, ranks_of_default_group(rank, world))
    while run.run_state.step < config.max_steps:
        run.train_one()
    run.parts.output.replace(Path(config.output_dir), run.parts.moe, run.ranks)


def clients(rank: int, world: int, config: Config) -> None:
    """All trainings of a round, one after another."""
    for one in configs_of(config, 1).values():
        begin = str(round_folder(config, 1).begin)
        train(rank, world, replace(one, lora=replace(one.lora, init_from=begin), fssdp=config.fssdp))


def trained(workshop: Path, world: int, case: str, isolation: str) -> dict[str, dict[str, torch.Tensor]]:
    """What each client sends, by name, as tensors of its adapter."""
    name = f"{case}-{isolation}-{world}".replace(" ", "-")
    policy = POLICIES[world % 2]
    config = recipe(workshop, name, *CASES[case], f"rounds.isolation={isolation}", f"fssdp.policy={policy}")
    plans = plans_of(config)
    for plan in plans.values():
        receive(plan)
    run_ranks(world, clients, config)
    found = {}
    for process, members in processes_of(config, 1).items():
        for client in members:
            adapter = round_folder(config, 1).runs / process / "adapters" / client.name
            plan = plans[client.name]
            send(plan, adapter)
            began = decode(Path(plan.down or "").read_bytes(), plan.shape.numel)
            sent = decode(Path(plan.up).read_bytes(), plan.shape.numel)
            assert float(sent.abs().max()) > 1e-3, "nothing was learned"
            torch.testing.assert_close(began + sent, flat(read_pairs(adapter, plan.shape), plan.shape), rtol=0, atol=1e-15)
            found[client.name] = {"sent": sent} | load_file(adapter / "adapter_model.safetensors")
    return found


def check_equal(workshop: Path, world: int, case: str) -> None:
    together, apart = (trained(workshop, world, case, isolation) for isolation in ("none", "process"))
    assert list(together) == list(apart) == ["up", "echo", "few"]
    for name in apart:
        torch.testing.assert_close(together[name]["sent"], apart[name]["sent"], **LIMIT)
    assert not torch.allclose(apart["up"]["sent"][:64], apart["echo"]["sent"][:64]), "clients have learned the same"


@pytest.mark.parametrize("case", CASES)
def test_clients_trained_together_equal_clients_apart(workshop: Path, case: str) -> None:
    check_equal(workshop, 1, case)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_they_are_equal_on_any_number_of_ranks(workshop: Path, world: int, case: str) -> None:
    check_equal(workshop, world, case)


def test_one_client_is_an_ordinary_run(workshop: Path) -> None:
    config = recipe(workshop, "one", "rounds.clients=[{{data: {folder}/up.train.jsonl, name: up}}]")
    plan = plans_of(config)["up"]
    receive(plan)
    (alone,) = configs_of(config, 1).values()
    run_ranks(1, train, replace(alone, lora=replace(alone.lora, init_from=str(round_folder(config, 1).begin))))
    ordinary = replace(
        alone,
        moe=replace(alone.moe, router=replace(alone.moe.router, input="token")),
        data=replace(alone.data, separate=False),
        lora=replace(alone.lora, init_from=plan.begin),
        output_dir=f"{workshop}/runs/ordinary",
    )
    run_ranks(1, train, ordinary)
    ours = load_file(Path(alone.output_dir) / "adapters/up/adapter_model.safetensors")
    for name, tensor in load_file(Path(ordinary.output_dir) / "adapter/adapter_model.safetensors").items():
        torch.testing.assert_close(ours[name], tensor, **LIMIT)


def test_a_later_round_goes_on_in_the_data(workshop: Path) -> None:
    """Two rounds of three steps see the samples of one run of six; a round whose clients begin anew has another seed."""
    config = recipe(workshop, "data")
    assert trained_together(config, 2, config.rounds.clients, workshop).data.skip_steps == 3
    stacks = recipe(workshop, "data", "rounds.aggregate=stack", "rounds.merge_into_base=true", "seed=7")
    anew = trained_together(stacks, 3, config.rounds.clients, workshop)
    assert (anew.data.skip_steps, anew.seed, anew.model.name_or_path) == (0, 9, f"{workshop}/runs/data/round-3/base")
    found: list[list[list[tuple[tuple[int, int], ...]]]] = run_ranks(1, samples, config)
    whole, second = found[0]
    assert second == whole[3:]


def samples(rank: int, world: int, config: Config) -> list[list[list[tuple[tuple[int, int], ...]]]]:
    """The samples of the steps of a run of six steps, and of round 2."""
    found = []
    for number, steps in ((1, 6), (2, 3)):
        one = trained_together(config, number, config.rounds.clients, Path(config.output_dir) / str(number))
        stream = Training(one, ranks_of_default_group(rank, world)).parts.stream
        found.append([[sequence.samples for sequence in stream.next_step()] for _ in range(steps)])
    return found


def test_what_came_down_is_merged_into_the_base_model(workshop: Path) -> None:
    """FLoRA's second round: the base's weight and all terms of the first, to the rounding of the base's float32."""
    config = recipe(workshop, "merged", UNEQUAL, "rounds.aggregate=stack", "rounds.merge_into_base=true")
    shape = vector_shape(config)
    first = client_plan(config, shape, config.rounds.clients[0], 1, 0)
    assert (first.down, first.merging) == (None, None)
    receive(first)
    begun, description = load_lora(Path(first.begin))
    assert (description.r, description.scale) == (4, 2.0)
    assert not any(tensor.any() for name, tensor in begun.items() if "lora_B" in name)
    plan = client_plan(config, shape, config.rounds.clients[0], 2, 7)
    assert plan.merging is not None
    stacked = shape.of_rank(7, 1.0)
    vector = torch.randn(stacked.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    write_message(plan.merging.down, encode(vector, 1.0))
    receive(plan)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (config.model.name_or_path, plan.described.base))
    for path, (a_rI, b_Or) in pairs_of(vector, stacked).items():
        added = after[f"{path}.weight"].double() - before[f"{path}.weight"].double()
        torch.testing.assert_close(added, b_Or @ a_rI, rtol=1e-5, atol=1e-5)
    kept = before["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(after["model.layers.0.self_attn.v_proj.weight"], kept)
    second, _ = load_lora(Path(plan.begin))
    assert not torch.equal(next(iter(second.values())), next(iter(begun.values()))), "the new adapter is the old one"


def test_what_the_client_gets_is_checked(workshop: Path) -> None:
    config = recipe(workshop, "damaged")
    plan = plans_of(config)["up"]
    path = Path(plan.down or "")
    message = bytearray(path.read_bytes())
    message[-1] ^= 1
    path.write_bytes(message)
    with pytest.raises(UserError, match=r"a message of a federated round was refused: its checksum"):
        receive(plan)
    path.unlink()
    with pytest.raises(UserError, match=r"up\.down: the message cannot be read: No such file"):
        receive(plan)
