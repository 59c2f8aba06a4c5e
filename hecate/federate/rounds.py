"""Federated rounds: each is an ordinary training of its clients, one operation on their adapters, and a restart from its result.

    per round    message down -> clients train -> message up -> aggregate -> held-out losses -> a line of rounds.jsonl

    round-2/     messages/NAME.down, .up   plans/   begin/NAME   runs/NAME or runs/together   received/NAME   union   held_out.json

Each part leaves its files as a whole, and is passed over if they are there, so that a run goes on in the part in which it was stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hecate.adapters.sets.forms import write_set
from hecate.adapters.sets.sums import average
from hecate.config import Config, to_yaml
from hecate.errors import UserError
from hecate.federate.base import shape_of
from hecate.federate.checks import client_weights, keep_recipe, samples_of
from hecate.federate.client import ClientPlan, write_message
from hecate.federate.codec import encode
from hecate.federate.held_out import held_out_figures
from hecate.federate.plans import (
    PROGRAM,
    RoundFolder,
    begins_anew,
    client_plan,
    configs_of,
    described_of,
    process_plan,
    processes_of,
    round_folder,
    sweep_of,
    taking_part,
)
from hecate.federate.privacy import check_rates, privacy_of_clients
from hecate.federate.records import UNION, RoundRecord, add_record, line_of, read_records
from hecate.federate.server import (
    adapter_set,
    aggregated,
    begun_with,
    first_adapter,
    received,
    stepped,
    sum_of_rounds,
    whole_error,
    write_pairs,
)
from hecate.federate.server_optimizer import ServerState, load_server, save_server
from hecate.federate.vectors import Pairs, VectorShape, flat, pairs_of, read_pairs
from hecate.io.durable import replace_file
from hecate.io.json_records import to_json_values
from hecate.io.strict_json import dump_json
from hecate.sweep.ledger import RunState, read_entries, working_alone
from hecate.sweep.processes import train_runs
from hecate.sweep.sweep_file import Sweep

Say = Callable[[str], None]
"""shows a line"""
_USER_ERROR = "status 2:"
"""how the reason begins for which a process has failed by a user's mistake"""


@dataclass(frozen=True)
class _Server:
    """What the server has before a round."""

    shape: VectorShape
    """of the widest client"""
    pairs: Pairs | None
    """its adapter; None: clients begin anew"""
    state: ServerState | None
    """of its optimizer; None: there is none"""
    stacked: int
    """the number of terms of the last round's result, where clients begin anew"""


def federate(config: Config, verb: Sequence[str], say: Say) -> int:
    """Train the configured rounds, or those that are left of them.

    Args:
        verb: the words after `hecate` that train a configuration: ["train"].

    Returns:
        0 if all rounds are done, or 128 + the number of the signal that has stopped a training.

    Raises:
        UserError: a client has no samples, or with privacy fewer than a step takes; a training has failed; a file cannot be read or written.
    """
    samples = {client.name: samples_of(client) for client in config.rounds.clients}
    check_rates(config, samples)
    with working_alone(config.output_dir):
        keep_recipe(config)
        shape = shape_of(config)
        done = read_records(Path(config.output_dir))
        for number in range(len(done) + 1, config.rounds.count + 1):
            status = _one_round(config, shape, number, samples, verb, say)
            if status:
                say(f"stopped in round {number}; the same command with resume=true goes on")
                return status
        for name, spent in privacy_of_clients(config, samples, config.rounds.count).items():
            say(f"privacy of {name}: {spent}")
        say(f"wrote {_write_result(config, shape)}")
    return 0


def _one_round(config: Config, shape: VectorShape, number: int, samples: Mapping[str, int], verb: Sequence[str], say: Say) -> int:
    started, folder, rounds = time.monotonic(), round_folder(config, number), config.rounds
    server = _server_before(config, shape, number)
    plans = {one.name: client_plan(config, shape, one, number, server.stacked) for one in taking_part(config, number)}
    begun = _send_down(folder, server, plans, config)
    configs = configs_of(config, number)
    for name, clients in processes_of(config, number).items():
        plan = process_plan(config, name, number, tuple(plans[client.name] for client in clients), tuple(verb))
        folder.plans.mkdir(parents=True, exist_ok=True)
        replace_file(Path(plan.config), [to_yaml(configs[name]).encode()])
        replace_file(folder.plans / f"{name}.json", [dump_json(to_json_values(plan))])
    sweep = sweep_of(config, number)
    status = train_runs(sweep, configs, (), lambda place, one: {}, say, program=PROGRAM, what=f"round {number} of {rounds.count}")
    if status > 128:
        return status
    failed = _failed(sweep, say) if status else set[str]()
    names = [name for name in plans if name not in failed]
    weights = client_weights([one for one in taking_part(config, number) if one.name in names], [samples[name] for name in names])
    described = described_of(config, number)
    adapters: dict[str, Pairs] = {}
    for name in names:
        adapters[name] = received(plans[name], begun[name])
        write_pairs(folder.received / name, adapters[name], plans[name].shape, described)
    sets = [adapter_set(name, pairs, plans[name].shape, described) for name, pairs in adapters.items()]
    parts = [weights[name] for name in names]
    merged = aggregated(sets, parts, rounds)
    error = whole_error(merged)
    average_error = error if rounds.aggregate == "average" else whole_error(average(sets, parts, inexact=True))
    shutil.rmtree(folder.union, ignore_errors=True)
    if server.state is None:
        write_set(merged, folder.union)
    else:
        state = stepped(server.state, adapters, shape, parts, rounds)
        save_server(folder.path / "server.safetensors", state)
        write_pairs(folder.union, pairs_of(state.vector, shape), shape, described)
    figures = {}
    if config.data.eval:
        figures = held_out_figures(config, number, {UNION: folder.union} | {name: folder.received / name for name in names})
    record = RoundRecord(
        round=number,
        weights=weights,
        dropped=tuple(client.name for client in rounds.clients if client.name not in names),
        bytes_down={name: _size(folder.messages / f"{name}.down") for name in plans},
        bytes_up={name: _size(folder.messages / f"{name}.up") for name in names},
        aggregation_error=error,
        average_error=average_error,
        held_out=figures,
        privacy=privacy_of_clients(config, samples, number),
        seconds=time.monotonic() - started,
    )
    add_record(Path(config.output_dir), record)
    say(line_of(record, rounds.count))
    return 0


def _server_before(config: Config, shape: VectorShape, number: int) -> _Server:
    before = round_folder(config, number - 1)
    if begins_anew(config):
        stacked = sum(_rank_of(config, name) for name in read_records(Path(config.output_dir))[-1].weights) if number > 1 else 0
        return _Server(shape, None, None, stacked)
    uses_optimizer = (config.rounds.server.optimizer, config.rounds.server.learning_rate) != ("sgd", 1.0)
    if number == 1:
        pairs = first_adapter(shape)
        return _Server(shape, pairs, ServerState(flat(pairs, shape)) if uses_optimizer else None, 0)
    if uses_optimizer:
        state = load_server(before.path / "server.safetensors")
        return _Server(shape, pairs_of(state.vector, shape), state, 0)
    return _Server(shape, read_pairs(before.union, shape), None, 0)


def _rank_of(config: Config, name: str) -> int:
    client = next(one for one in config.rounds.clients if one.name == name)
    return config.lora.rank if client.r is None else client.r


def _send_down(folder: RoundFolder, server: _Server, plans: Mapping[str, ClientPlan], config: Config) -> dict[str, Tensor | None]:
    """Write the messages to the clients; of each client the vector from which the server counts its changes."""
    begun: dict[str, Tensor | None] = {}
    for name, plan in plans.items():
        begun[name] = None if server.pairs is None else begun_with(server.pairs, server.shape, plan.shape)
        vector = begun[name]
        if vector is not None:
            assert plan.down is not None
            write_message(plan.down, encode(vector, config.rounds.codec.down))
        elif plan.merging is not None:
            stacked = server.shape.of_rank(server.stacked, 1.0)
            last = folder.path.parent / f"round-{int(folder.path.name.removeprefix('round-')) - 1}"
            write_message(plan.merging.down, encode(flat(read_pairs(RoundFolder(last).union, stacked), stacked), 1.0))
    return begun


def _failed(sweep: Sweep, say: Say) -> set[str]:
    """The clients whose processes have failed: they drop out of the round.

    Raises:
        UserError: a user's mistake made one fail, or none is left.
    """
    entries = read_entries(sweep)
    failed = {run.name: entries[run.name].reason for run in sweep.runs if entries[run.name].state is not RunState.FINISHED}
    mistakes = [name for name, reason in failed.items() if reason.startswith(_USER_ERROR)]
    if mistakes or len(failed) == len(sweep.runs):
        name = (mistakes or list(failed))[0]
        raise UserError(f"{name}: its training has failed: {failed[name]}\n  mend it, and give the same command with resume=true")
    for name, reason in failed.items():
        say(f"{name}: drops out of this round: {reason}")
    return set(failed)


def _write_result(config: Config, shape: VectorShape) -> Path:
    """Write the adapter that the rounds leave: the last result, or the terms of all, where each was merged into the base."""
    folder, records = Path(config.output_dir) / "adapter", read_records(Path(config.output_dir))
    shutil.rmtree(folder, ignore_errors=True)
    unions = [round_folder(config, record.round).union for record in records]
    if not begins_anew(config):
        shutil.copytree(unions[-1], folder)
        return folder
    ranks = [sum(_rank_of(config, name) for name in record.weights) for record in records]
    write_set(sum_of_rounds(unions, shape, ranks, described_of(config, 1)), folder)
    return folder


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
