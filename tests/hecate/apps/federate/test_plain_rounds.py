"""Rounds of federated averaging beside a plain loop: client by client with torch's AdamW begun anew, then the means of A and of B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hecate.apps.federate.client import ProcessPlan, receive, send
from hecate.apps.federate.plans import round_folder, trained_together
from hecate.apps.federate.rounds import federate
from hecate.config import Config
from hecate.io.json_records import from_json_values
from hecate.io.strict_json import parse_json
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.apps.federate.making import recipe
from tests.hecate.train.in_process import ranks_of_default_group
from tests.plain_lora import PlainAdapter

PLACES = ("self_attn.q_proj", "mlp.down_proj")
RATE, DECAY, MAX_NORM, SCALE = 1e-2, 0.1, 1e-3, 2.0
SETTINGS = (f"learning_rate={RATE}", "warmup_ratio=0", f"weight_decay={DECAY}", f"max_grad_norm={MAX_NORM}")
RECORDS = {"up": 120, "echo": 120, "few": 6}

Samples = list[tuple[list[int], list[int]]]
"""token ids and targets of each"""


def train(rank: int, world: int, config: Config) -> None:
    run = Training(config, ranks_of_default_group(rank, world))
    while run.run_state.step < config.max_steps:
        run.train_one()
    run.parts.output.replace(Path(config.output_dir), run.parts.moe, run.ranks)


def steps_of(rank: int, world: int, config: Config) -> list[list[dict[str, Samples]]]:
    """The samples of each client, by round and step, in the order of the run's data."""
    found = []
    for number in range(1, config.rounds.count + 1):
        one = trained_together(config, number, config.rounds.clients, Path(config.output_dir) / f"order-{number}")
        stream = Training(one, ranks_of_default_group(rank, world)).parts.stream
        steps = []
        for _ in range(config.max_steps):
            step: dict[str, Samples] = {source.name: [] for source in stream.sources}
            for source, sample in (place for sequence in stream.next_step() for place in sequence.samples):
                encoded = stream.sources[source][sample]
                step[stream.sources[source].name].append((encoded.input_ids.tolist(), encoded.targets.tolist()))
            steps.append(step)
        found.append(steps)
    return found


def train_in_this_process(_sweep: Any, configs: dict[str, Config], *_: Any, **__: Any) -> int:
    """What the clients' processes do in a round."""
    for name, config in configs.items():
        (file,) = Path(config.output_dir).parents[1].glob(f"plans/{name}.json")
        plan = from_json_values(ProcessPlan, parse_json(file.read_bytes()))
        for client in plan.clients:
            receive(client)
        run_ranks(1, train, replace(config, lora=replace(config.lora, init_from=plan.begin)))
        for client in plan.clients:
            send(client, Path(plan.adapters) / client.name)
    return 0


def factors(folder: Path) -> list[dict[str, Tensor]]:
    """The A and B of each layer, as `PlainAdapter` names them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return [
        {
            f"{place.rpartition('.')[2]}.{letter}": tensors[f"base_model.model.model.layers.{layer}.{place}.lora_{letter}.weight"]
            for place in PLACES
            for letter in "AB"
        }
        for layer in range(2)
    ]


def test_rounds_of_averaging_are_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = make_workshop(tmp_path)
    config = recipe(workshop, "rounds", "rounds.local_steps=2", *SETTINGS)
    monkeypatch.setattr("hecate.apps.federate.rounds.train_runs", train_in_this_process)
    assert federate(config, ["train"], lambda _: None) == 0
    (rounds,) = run_ranks(1, steps_of, config)
    server = factors(round_folder(config, 1).begin / "up")
    for number, steps in enumerate(rounds, start=1):
        trained = {}
        for client in RECORDS:
            model = LlamaForCausalLM.from_pretrained(workshop / "model", dtype=torch.float64)
            plain = PlainAdapter(model, server, SCALE, RATE, DECAY, PLACES)
            for step in steps:
                _, norm = plain.step([(torch.tensor(ids), torch.tensor(targets)) for ids, targets in step[client]], MAX_NORM)
                assert norm > MAX_NORM or not step[client], "nothing was clipped"
            trained[client] = [{name: one.detach() for name, one in layer.items()} for layer in plain.layers]
            for got, wanted in zip(factors(round_folder(config, number).path / "received" / client), trained[client], strict=True):
                for name, tensor in wanted.items():
                    torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-10, msg=lambda text, at=(number, client): f"{at}: {text}")
        total = sum(RECORDS.values())
        before = server
        server = [
            {name: sum(records / total * trained[client][layer][name] for client, records in RECORDS.items()) for name in before[layer]}
            for layer in range(2)
        ]
        assert all(float((server[0][f"down_proj.{letter}"] - before[0][f"down_proj.{letter}"]).abs().max()) > 1e-3 for letter in "AB")
    for got, wanted in zip(factors(workshop / "runs/rounds/adapter"), server, strict=True):
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-10)
