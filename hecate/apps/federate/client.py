"""The clients' side of a round: `python -m hecate.apps.federate.client PLANS output_dir=FOLDER [resume=true]`.

PLANS/NAME.json says what a process does, where NAME is the last part of FOLDER: for each of its clients it makes an adapter of the
message that came down, has `hecate train` train all of them on, and writes each one's message up. With `rounds.isolation: process` a
process has one client; otherwise one process has all. The server gets nothing of what a client has but its message.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from hecate.adapters.folder import save_adapter
from hecate.adapters.formats.merged import write_merged
from hecate.adapters.peft.description import LoraDescription, linear_names
from hecate.apps.federate.codec import decode, encode
from hecate.apps.federate.vectors import Pairs, VectorShape, flat, new_pairs, pairs_of, read_pairs
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.io.durable import replace_file
from hecate.io.json_records import from_json_values
from hecate.io.plain_files import read_plain
from hecate.io.python_module import RUN_MODULE
from hecate.io.signals import on_signals
from hecate.io.strict_json import JsonError, parse_json
from hecate.io.terminal import show_messages
from hecate.model.files.load import resolve_model
from hecate.model.files.stored_model import open_stored

_log = logging.getLogger("hecate.apps.federate.client")  # also where this module is the program

_MOST_MESSAGE = 1 << 36
"""bytes of a message: those of the longest vector in float64, and of its places"""


@dataclass(frozen=True)
class Described:
    """What an adapter's description says beside its rank."""

    base: str
    """the base model that it is trained over"""
    alpha: int
    use_rslora: bool
    target_modules: tuple[str, ...]

    def of_rank(self, rank: int, alpha: int | None = None) -> LoraDescription:
        return LoraDescription(
            base_model_name_or_path=self.base,
            r=rank,
            alpha=self.alpha if alpha is None else alpha,
            use_rslora=self.use_rslora if alpha is None else False,
            target_modules=self.target_modules,
            target_parameters=(),
        )


@dataclass(frozen=True)
class Merging:
    """A message down that is merged into the base model, and over what it makes of it clients begin anew (FLoRA)."""

    down: str
    rank: int
    """of the terms in the message, whose scale is 1"""
    into: str
    """the base model that the terms are for"""
    out: str
    """The folder of the new one. Clients on one disk share it: the message is the same for all, and the first makes it."""


@dataclass(frozen=True)
class ClientPlan:
    """What one client does in a round."""

    name: str
    shape: VectorShape
    described: Described
    begin: str
    """the folder of the adapter that it begins with"""
    down: str | None
    """the file of the server's vector; None: the client begins with a new adapter"""
    merging: Merging | None
    up: str
    """the file of its message"""
    density: float
    """of that message"""
    kept_before: str | None
    """the file of what it did not send before, which is added to its changes; None: there is none"""
    keeps: str | None
    """the file for what it does not send now; None: that is forgotten"""


@dataclass(frozen=True)
class ProcessPlan:
    """What one process does in a round."""

    config: str
    """the configuration of its training"""
    verb: tuple[str, ...]
    """the words after `hecate` before it"""
    adapters: str
    """where the training leaves the adapters of its clients"""
    begin: str
    """the folder of the adapters that its clients begin with"""
    clients: tuple[ClientPlan, ...]


def receive(plan: ClientPlan) -> None:
    """Make the adapter that the client begins with, and the base model if a message is to be merged into it, unless they are there.

    Raises:
        UserError: a message is damaged, a model or an adapter cannot be read or written.
    """
    shape = plan.shape
    if plan.merging is not None and not Path(plan.merging.out).exists():
        _merge(plan.merging, shape, plan.described)
    if not Path(plan.begin).exists():
        pairs = new_pairs(shape) if plan.down is None else pairs_of(decode(read_message(plan.down), shape.numel), shape)
        Path(plan.begin).parent.mkdir(parents=True, exist_ok=True)
        save_adapter(Path(plan.begin), peft_tensors(pairs), plan.described.of_rank(shape.rank))


def send(plan: ClientPlan, trained: Path) -> None:
    """Write the message up, unless it is there: what training has changed of the server's vector, or the whole new adapter.

    Raises:
        UserError: the adapter cannot be read, it is not finite, or the disk fails.
    """
    if os.path.exists(plan.up):
        return
    vector = flat(read_pairs(trained, plan.shape), plan.shape)
    if plan.down is not None:
        vector = vector - decode(read_message(plan.down), plan.shape.numel)
    if plan.kept_before is not None:
        vector = vector + decode(read_message(plan.kept_before), plan.shape.numel)
    message = encode(vector, plan.density)
    if plan.keeps is not None:
        write_message(plan.keeps, encode(vector - decode(message, plan.shape.numel), 1.0))
    write_message(plan.up, message)


def write_message(path: str, message: bytes) -> None:
    """Write a message as a whole. Raises UserError if the disk fails."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(path), [message])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def peft_tensors(pairs: Pairs) -> dict[str, torch.Tensor]:
    """Return pairs by the names that PEFT's files have for them."""
    tensors = {}
    for path, (a_rI, b_Or) in pairs.items():
        name_a, name_b = linear_names(path)
        tensors[name_a], tensors[name_b] = a_rI.contiguous(), b_Or.contiguous()
    return tensors


def run_process(plan: ProcessPlan, overrides: Sequence[str]) -> int:
    """Receive, train and send for all clients of a process; the exit status of the training.

    Raises:
        UserError: see `receive` and `send`.
    """
    for client in plan.clients:
        receive(client)
    command = [*RUN_MODULE, "hecate", *plan.verb, plan.config, *overrides, f'lora.init_from="{plan.begin}"']
    with subprocess.Popen(command, start_new_session=True) as process:

        def pass_on(number: int, _frame: FrameType | None) -> None:
            process.send_signal(number)

        with on_signals(pass_on):
            status = process.wait()
    if status == 0:
        for client in plan.clients:
            send(client, Path(plan.adapters) / client.name)
    return status


def read_plan(path: Path) -> ProcessPlan:
    """Raises UserError: the file cannot be read."""
    try:
        return from_json_values(ProcessPlan, parse_json(read_plain(path)))
    except (OSError, JsonError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _merge(merging: Merging, shape: VectorShape, described: Described) -> None:
    stacked = shape.of_rank(merging.rank, 1.0)
    tensors = peft_tensors(pairs_of(decode(read_message(merging.down), stacked.numel), stacked))
    base = open_stored(resolve_model(merging.into))
    write_merged(Path(merging.out), base, tensors, described.of_rank(merging.rank, alpha=merging.rank))


def read_message(path: str) -> bytes:
    """Raises UserError: the file cannot be read."""
    try:
        return read_plain(path, _MOST_MESSAGE)
    except OSError as error:
        raise UserError(f"{path}: the message cannot be read: {error.strerror or error}") from error


def main(arguments: Sequence[str]) -> int:
    """Raises SystemExit with status 2 after a user's mistake, whose text is printed."""
    show_messages()
    plans, output, *rest = arguments
    folder = Path(output.removeprefix("output_dir=").strip('"'))
    try:
        return run_process(read_plan(Path(plans) / f"{folder.name}.json"), [output, *rest])
    except UserError as error:
        _log.error(f"hecate: {error}")
        return USER_ERROR_EXIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
