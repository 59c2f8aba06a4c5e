"""What is checked of a federated run before any of its processes starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hecate.apps.federate.plans import TOGETHER, configs_of, round_folder
from hecate.apps.federate.records import read_rounds, rounds_file
from hecate.apps.federate.section.settings import ClientConfig, rounds_of
from hecate.config import Change, Config, to_yaml
from hecate.config.files.paths import indexed_prefix
from hecate.data.files.formats import Sample, read_samples
from hecate.data.files.indexed_files import open_indexed
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.io.plain_files import read_plain_text
from hecate.io.strict_yaml import MOST_BYTES, YamlError
from hecate.launch.many_runs.ledger import changed_values

RECIPE = "federate.yaml"
"""in the folder of a federated run: what it computes"""
_FREE = ("rounds.count", "rounds.drop", "rounds.isolation")
"""keys that may change when a federated run is resumed, beside those of any run"""


def check_federated(config: Config, check: Callable[[Config], None]) -> None:
    """Check a recipe, and the trainings of all rounds by those of the first.

    Args:
        check: raises UserError if something is wrong with a training, such as its data.

    Raises:
        UserError: there are no clients, a training cannot be, or the folder is that of another run.
    """
    if not rounds_of(config).clients:
        raise UserError(
            "rounds.clients: must be given: hecate federate trains clients\n"
            "  for example rounds={local_steps: 20, clients: [{data: a.jsonl}, {data: b.jsonl}]}; hecate train trains without them"
        )
    if rounds_of(config).aggregate == "lego":
        from hecate.adapters.sets.lego import require_scikit_learn

        require_scikit_learn()
    if "," in str(Path(config.output_dir).absolute()):
        raise UserError(f"output_dir: {config.output_dir}: hecate federate takes no path with a comma\n  choose another output_dir")
    _check_folder(config)
    for one in configs_of(config, 1).values():
        check(one)


def client_weights(clients: Sequence[ClientConfig], samples: Mapping[str, int]) -> dict[str, float]:
    """Return each client's part, by name: as configured, or by its samples; with the sum 1 for the clients that are given."""
    parts = [samples[client.name] if client.weight is None else client.weight for client in clients]
    return {client.name: part / sum(parts) for client, part in zip(clients, parts, strict=True)}


def count_samples(client: ClientConfig) -> int:
    """Return the number of a client's records that can be read.

    Raises:
        UserError: there are none.
    """
    if (prefix := indexed_prefix(client.data)) is not None:
        return len(open_indexed(prefix).bounds) - 1
    try:
        found = sum(isinstance(item, Sample) for item in read_samples(client.data))
    except UserError as error:
        raise UserError(f"rounds.clients: {client.name} has no samples: {error}") from error
    if not found:
        raise UserError(f"rounds.clients: {client.name} has no samples: no record of {client.data} can be read\n  leave the client out")
    return found


def keep_recipe(config: Config) -> None:
    """Write what the run computes into its folder. Raises UserError: the disk refuses."""
    path = Path(config.output_dir) / RECIPE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [to_yaml(config).encode()])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _changes(path: Path, config: Config) -> list[Change]:
    """Raises UserError: the file is damaged."""
    try:
        return changed_values(read_plain_text(path, MOST_BYTES), config)
    except (OSError, UnicodeDecodeError, YamlError) as error:
        hint = "take another output_dir; this one's rounds cannot be gone on with"
        raise UserError(f"{path}: cannot be read as what the run computes: {str(error)[:300]}\n  {hint}") from error


def _check_folder(config: Config) -> None:
    if not config.resume:
        return
    path = Path(config.output_dir) / RECIPE
    if not path.exists():
        if rounds_file(path.parent).exists() or (path.parent.is_dir() and any(path.parent.iterdir())):
            raise UserError(f"{path.parent}: is not the folder of a federated run: it has no {RECIPE}\n  choose another output_dir")
        return
    every = _changes(path, config)
    # On another number of ranks clients would not go on where they ended in their data, and epsilon would be that of other steps.
    changes = [one for one in every if one.key not in _FREE and (one.key != "nproc" or one.then is not None)]
    under_way = len(read_rounds(path.parent)) + 1
    if any(one.key == "rounds.drop" for one in every) and (round_folder(config, under_way).runs / TOGETHER).exists():
        raise UserError(
            f"rounds.drop: cannot change in round {under_way}, which has begun: with rounds.isolation=none its clients are one process\n"
            "  go back to the value until that round is done"
        )
    if changes:
        one = changes[0]
        raise UserError(
            f"{path.parent}: was begun with other values: {one.key} was {json.dumps(one.then)}, and is {json.dumps(one.now)} now\n"
            "  take another output_dir, or go back to the values"
        )
