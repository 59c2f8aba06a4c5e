"""What the processes of a round do, as values: who takes part, which configuration each process trains, which files go between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hecate.apps.federate.client import ClientPlan, Described, Merging, ProcessPlan
from hecate.apps.federate.section.settings import ClientConfig, rounds_of, without_rounds
from hecate.apps.federate.vectors import VectorShape
from hecate.config import Config, DataSource, EvalConfig, named_model
from hecate.io.python_module import RUN_MODULE
from hecate.launch.many_runs.sweep import Sweep, SweepRun
from hecate.parallel.values.expert_kinds import lora_scale

TOGETHER = "together"
"""the name of the process that trains all clients at once"""
PROGRAM = (*RUN_MODULE, "hecate.apps.federate.client")


@dataclass(frozen=True)
class RoundFolder:
    """Where the files of a round are."""

    path: Path

    @property
    def messages(self) -> Path:
        return self.path / "messages"

    @property
    def plans(self) -> Path:
        return self.path / "plans"

    @property
    def runs(self) -> Path:
        """One folder for each process: its training's output_dir."""
        return self.path / "runs"

    @property
    def begin(self) -> Path:
        """Adapters that clients begin with."""
        return self.path / "begin"

    @property
    def kept(self) -> Path:
        """What clients have not sent, with rounds.codec.error_feedback. They alone read it."""
        return self.path / "kept"

    @property
    def received(self) -> Path:
        """The clients' adapters as the server sees them."""
        return self.path / "received"

    @property
    def union(self) -> Path:
        """The aggregate: all that the server has."""
        return self.path / "union"

    @property
    def shown(self) -> Path:
        """With rounds.codec.down below 1: what of the aggregate goes down."""
        return self.path / "shown"

    @property
    def base(self) -> Path:
        """With merge_into_base: the base model with the results of the earlier rounds in it."""
        return self.path / "base"


def round_folder(config: Config, number: int) -> RoundFolder:
    return RoundFolder(Path(config.output_dir).absolute() / f"round-{number}")


def result_of(config: Config, number: int) -> Path:
    """Return the folder of a round's result: what of the aggregate goes down, which clients go on with, as FLASC (2406.05233) has it."""
    folder = round_folder(config, number)
    return folder.shown if rounds_of(config).codec.down < 1 else folder.union


def begins_anew(config: Config) -> bool:
    """Whether clients begin each round with new adapters, and not with the result of the last."""
    return rounds_of(config).aggregate == "stack"


def taking_part(config: Config, number: int) -> tuple[ClientConfig, ...]:
    """Return the clients whose updates are not to be missing in a round, in the configured order."""
    gone = {item.partition(":")[2] for item in rounds_of(config).drop if item.partition(":")[0] == str(number)}
    return tuple(client for client in rounds_of(config).clients if client.name not in gone)


def rank_of(config: Config, client: ClientConfig) -> int:
    """Return the rank of a client's adapter."""
    return config.lora.rank if client.r is None else client.r


def shape_of_client(config: Config, shape: VectorShape, client: ClientConfig, number: int) -> VectorShape:
    """Return what a client's vector is. Where clients begin anew, the seed is that of the round."""
    rank = rank_of(config, client)
    scale = lora_scale(config.lora.stored_alpha, rank, rslora=config.lora.use_rslora)
    return replace(shape.of_rank(rank, scale), seed=seed_of(config, number))


def seed_of(config: Config, number: int) -> int:
    return config.seed + (number - 1 if begins_anew(config) else 0)


def base_of_round(config: Config, number: int) -> str:
    """Return the name or path of the base model that clients train over."""
    return str(round_folder(config, number).base) if begins_anew(config) and number > 1 else config.model.name_or_path


def described_of(config: Config, number: int) -> Described:
    """Return what is said of the adapters of a round."""
    base = named_model(base_of_round(config, number))
    return Described(base, config.lora.stored_alpha, config.lora.use_rslora, config.lora.target_modules)


def trained_together(config: Config, number: int, clients: Sequence[ClientConfig], output: Path) -> Config:
    """Return the configuration of an ordinary run that trains these clients, each as if it were alone.

    The learning rate's curve is that of one round. A step has as many sequences of each client as it has of one alone.
    """
    anew = begins_anew(config)
    ranks = tuple(rank_of(config, client) for client in clients)
    return replace(
        without_rounds(config),
        model=replace(config.model, name_or_path=base_of_round(config, number)),
        data=replace(
            config.data,
            train=tuple(DataSource(path=client.data, name=client.name) for client in clients),
            eval=(),
            separate=True,
            skip_steps=0 if anew else (number - 1) * config.max_steps,
        ),
        seed=seed_of(config, number),
        output_dir=str(output),
        resume=False,
        eval=EvalConfig(),
        eval_steps=None,
        gradient_accumulation_steps=config.gradient_accumulation_steps * len(clients),
        lora=replace(config.lora, r=ranks[0] if len(set(ranks)) == 1 else ranks),
        moe=replace(config.moe, num_experts=len(clients)),
    )


def processes_of(config: Config, number: int) -> dict[str, tuple[ClientConfig, ...]]:
    """Return the clients of each process of a round, by the process's name."""
    clients = taking_part(config, number)
    return {client.name: (client,) for client in clients} if rounds_of(config).isolation == "process" else {TOGETHER: clients}


def configs_of(config: Config, number: int) -> dict[str, Config]:
    """Return the configuration of the training of each process of a round, by the process's name."""
    runs = round_folder(config, number).runs
    return {name: trained_together(config, number, clients, runs / name) for name, clients in processes_of(config, number).items()}


def client_plan(config: Config, shape: VectorShape, client: ClientConfig, number: int, stacked: int) -> ClientPlan:
    """Return what a client does in a round.

    Args:
        shape: of the widest client.
        stacked: the number of terms of the last round's result.
    """
    folder, anew = round_folder(config, number), begins_anew(config)
    down = str(folder.messages / f"{client.name}.down")
    merging = None
    if anew and number > 1:
        merging = Merging(down, stacked, base_of_round(config, number - 1), str(folder.base))
    return ClientPlan(
        name=client.name,
        shape=shape_of_client(config, shape, client, number),
        described=described_of(config, number),
        begin=str(folder.begin / client.name),
        down=None if anew else down,
        merging=merging,
        up=str(folder.messages / f"{client.name}.up"),
        density=rounds_of(config).codec.up,
        kept_before=_kept_before(config, client.name, number),
        keeps=str(folder.kept / client.name) if rounds_of(config).codec.error_feedback else None,
    )


def _kept_before(config: Config, name: str, number: int) -> str | None:
    """Return the file of what a client kept in the last round that it took part in, if there is one."""
    paths = (round_folder(config, earlier).kept / name for earlier in range(number - 1, 0, -1))
    return next((str(path) for path in paths if path.exists()), None)


def process_plan(config: Config, name: str, number: int, clients: tuple[ClientPlan, ...], verb: tuple[str, ...]) -> ProcessPlan:
    folder = round_folder(config, number)
    return ProcessPlan(str(folder.plans / f"{name}.yaml"), verb, str(folder.runs / name / "adapters"), str(folder.begin), clients)


def sweep_of(config: Config, number: int) -> Sweep:
    """Return the processes of a round as runs that `train_runs` trains, goes on with, and remembers."""
    folder = round_folder(config, number)
    runs = tuple(SweepRun(name, None, (), None, (), str(folder.runs / name)) for name in processes_of(config, number))
    return Sweep(f"round {number}", str(folder.plans), str(folder.runs), 1, runs)
