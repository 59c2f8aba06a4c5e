"""Federated rounds: each is an ordinary training of its clients, one operation on their adapters, and a restart from its result.

    per round    message down -> clients train -> message up -> aggregate -> held-out losses -> a line of rounds.jsonl

    round-2/     messages/NAME.down, .up   plans/   begin/NAME   runs/NAME or runs/together   received/NAME   union, shown   held_out.json

A run that was stopped goes on in the round, and in the training, in which it was. What takes no time is done again, to the same files.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hecate.adapters.sets.set_files import write_set
from hecate.adapters.sets.sums import average
from hecate.apps.federate.base import vector_shape
from hecate.apps.federate.before_round import SERVER_STATE, ServerBefore, send_down, server_before, size_of, stacked_rank
from hecate.apps.federate.checks import client_weights, count_samples, keep_recipe
from hecate.apps.federate.client import ClientPlan
from hecate.apps.federate.codec import decode, encode
from hecate.apps.federate.held_out import held_out_figures
from hecate.apps.federate.plans import (
    PROGRAM,
    begins_anew,
    client_plan,
    configs_of,
    described_of,
    process_plan,
    processes_of,
    result_of,
    round_folder,
    sweep_of,
    taking_part,
)
from hecate.apps.federate.privacy.clients import check_rates, privacy_of_clients
from hecate.apps.federate.records import UNION, RoundRecord, add_record, line_of, read_rounds
from hecate.apps.federate.section.settings import rounds_of
from hecate.apps.federate.server import adapter_set, aggregated, received, stepped, sum_of_rounds, whole_error, write_pairs
from hecate.apps.federate.server_optimizer import save_server
from hecate.apps.federate.vectors import Pairs, VectorShape, flat, pairs_of, read_pairs
from hecate.config import Config, to_yaml
from hecate.data.chat.templates import FILE, choose_template
from hecate.errors import UserError
from hecate.io.durable import new_folder, put_in_place, replace_file, successor_of
from hecate.io.json_records import to_json_values
from hecate.io.strict_json import dump_json
from hecate.launch.many_runs.ledger import RunState, read_entries, working_alone
from hecate.launch.many_runs.processes import train_runs
from hecate.launch.many_runs.sweep import Sweep
from hecate.model.files.load import load_tokenizer, resolve_model

Say = Callable[[str], None]
"""shows a line"""
_USER_ERROR = "status 2:"
"""how the reason begins for which a process has failed by a user's mistake"""


def federate(config: Config, verb: Sequence[str], say: Say) -> int:
    """Train the configured rounds, or those that are left of them.

    Args:
        verb: the words after `hecate` that train a configuration: ["train"].

    Returns:
        0 if all rounds are done, or 128 + the number of the signal that has stopped a training.

    Raises:
        UserError: a client has no samples, or with privacy fewer than a step takes; a training has failed; files cannot be written.
    """
    samples = {client.name: count_samples(client) for client in rounds_of(config).clients}
    check_rates(config, samples)
    shape = vector_shape(config)
    with working_alone(config.output_dir):
        keep_recipe(config)
        done = read_rounds(Path(config.output_dir))
        for number in range(len(done) + 1, rounds_of(config).count + 1):
            started = time.monotonic()
            server = server_before(config, shape, number, done)
            plans = {one.name: client_plan(config, shape, one, number, server.stacked) for one in taking_part(config, number)}
            begun = send_down(config, number, server, plans)
            status, names = _train(config, number, plans, verb, say)
            if status:
                say(f"stopped in round {number}; the same command with resume=true goes on")
                return status
            weights = client_weights([one for one in rounds_of(config).clients if one.name in names], samples)
            made = _aggregate(config, number, server, {name: plans[name] for name in names}, begun, weights)
            record = RoundRecord(
                round=number,
                weights=weights,
                dropped=tuple(client.name for client in rounds_of(config).clients if client.name not in names),
                bytes_down={name: size_of(round_folder(config, number).messages / f"{name}.down") for name in plans},
                bytes_up={name: size_of(Path(plans[name].up)) for name in names},
                aggregation_error=made.error,
                average_error=made.average_error,
                held_out=_held_out(config, number, names),
                privacy=privacy_of_clients(config, samples, number),
                seconds=time.monotonic() - started,
            )
            add_record(Path(config.output_dir), record)
            done.append(record)
            say(line_of(record, rounds_of(config).count))
        for name, spent in privacy_of_clients(config, samples, len(done)).items():
            say(f"privacy of {name}: {spent}")
        say(f"wrote {_write_result(config, shape, done)}")
    return 0


def _train(config: Config, number: int, plans: Mapping[str, ClientPlan], verb: Sequence[str], say: Say) -> tuple[int, list[str]]:
    """Have the clients of a round trained, or go on with that.

    Returns:
        0, and the names of the clients that have sent an update; or the status that a signal has left.

    Raises:
        UserError: see `_failed`.
    """
    folder, configs = round_folder(config, number), configs_of(config, number)
    for left in folder.path.glob("*.tmp-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder.plans.mkdir(parents=True, exist_ok=True)
    for name, clients in processes_of(config, number).items():
        plan = process_plan(config, name, number, tuple(plans[client.name] for client in clients), tuple(verb))
        replace_file(Path(plan.config), [to_yaml(configs[name]).encode()])
        replace_file(folder.plans / f"{name}.json", [dump_json(to_json_values(plan))])
    sweep = sweep_of(config, number)
    what = f"round {number} of {rounds_of(config).count}"
    status = train_runs(sweep, configs, (), lambda place, one: {}, say, program=PROGRAM, what=what)
    if status > 128:
        return status, []
    failed = _failed(sweep, say) if status else set()
    return 0, [name for name in plans if name not in failed]


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


@dataclass(frozen=True)
class _Aggregate:
    """What is known of a round's result."""

    error: float
    average_error: float


def _aggregate(
    config: Config,
    number: int,
    server: ServerBefore,
    plans: Mapping[str, ClientPlan],
    begun: Mapping[str, Tensor | None],
    weights: Mapping[str, float],
) -> _Aggregate:
    """Read the messages of the clients, and write their adapters and the round's result."""
    folder, described, rounds = round_folder(config, number), described_of(config, number), rounds_of(config)
    adapters: dict[str, Pairs] = {name: received(plan, begun[name]) for name, plan in plans.items()}
    for name, pairs in adapters.items():
        write_pairs(folder.received / name, pairs, plans[name].shape, described)
    sets = [adapter_set(name, pairs, plans[name].shape, described) for name, pairs in adapters.items()]
    parts = [weights[name] for name in adapters]
    merged = aggregated(sets, parts, rounds)
    error = whole_error(merged)
    shutil.rmtree(folder.union, ignore_errors=True)
    if server.state is None:
        write_set(merged, folder.union)
    else:
        state = stepped(server.state, adapters, server.shape, parts, rounds)
        save_server(folder.path / SERVER_STATE, state)
        write_pairs(folder.union, pairs_of(state.vector, server.shape), server.shape, described)
    if rounds.codec.down < 1:
        shutil.rmtree(folder.shown, ignore_errors=True)
        whole = flat(read_pairs(folder.union, server.shape), server.shape)
        shown = decode(encode(whole, rounds.codec.down), server.shape.numel)
        write_pairs(folder.shown, pairs_of(shown, server.shape), server.shape, described)
    return _Aggregate(error, error if rounds.aggregate == "average" else whole_error(average(sets, parts, inexact=True)))


def _held_out(config: Config, number: int, names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    if not config.data.eval:
        return {}
    folder = round_folder(config, number)
    return held_out_figures(config, number, {UNION: result_of(config, number)} | {name: folder.received / name for name in names})


def _write_result(config: Config, shape: VectorShape, done: Sequence[RoundRecord]) -> Path:
    """Write the adapter that the rounds leave: the last result, or the terms of all, where each was merged into the base.

    The chat template of the training lies beside it, unless it is the base model's own, as beside every adapter.
    """
    folder, results = Path(config.output_dir) / "adapter", [result_of(config, record.round) for record in done]
    written = successor_of(folder)
    own = load_tokenizer(resolve_model(config.model.name_or_path)).chat_template
    template = choose_template(own, config.data.chat_template)
    try:
        if begins_anew(config):
            ranks = [stacked_rank(config, record) for record in done]
            write_set(sum_of_rounds(results, shape, ranks, described_of(config, 1)), written)
        else:
            with new_folder(written) as staging:
                shutil.copytree(results[-1], staging, dirs_exist_ok=True)
        if template:
            replace_file(written / FILE, [template.text.encode()])
        put_in_place(written, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}\n  resume=true tries it again") from error
    return folder
