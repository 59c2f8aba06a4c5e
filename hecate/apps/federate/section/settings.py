"""The keys of federated rounds: the section `rounds` of a configuration."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from hecate.config.ranges import AT_LEAST_ZERO, COUNT, POSITIVE, Range, key

if TYPE_CHECKING:
    from hecate.config import Config


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """One item of rounds.clients."""

    data: str
    """The client's training data, as data.train's `path`."""
    name: str = ""
    """The client's name in logs, files and results: [A-Za-z0-9._-], 1 to 64 characters. Left out: that of the data's file without its last
    suffix."""
    eval: str | None = None
    """Its held-out data, on which the result of each round and all clients are evaluated."""
    r: int | None = None
    """The rank of its adapter. null: lora.r."""
    weight: float | None = None
    """Its part in the aggregate; those of all clients have the sum 1. null, then for all clients: its share of all clients' records."""


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """With rounds.aggregate refine: how B is corrected."""

    ridge: float = field(default=0.01, metadata=key(AT_LEAST_ZERO))
    """How much a change of B counts beside the distance."""
    distance: Literal["frobenius", "cosine"] = "frobenius"
    """What is made small. frobenius: the norm of the difference to the exact sum, in closed form. cosine: 1 - their cosine, by descent, as
    in the paper."""


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """What of a vector is sent: the numbers that are largest in magnitude, one ranking over the whole adapter, and zeros for the others."""

    down: float = field(default=1.0, metadata=key(Range(0, 1, low_open=True)))
    """The share of the server's numbers that clients get. They train all of them on. 1: all."""
    up: float = field(default=1.0, metadata=key(Range(0, 1, low_open=True)))
    """The share of a client's changes that it sends. 1: all."""
    error_feedback: bool = False
    """Each client keeps what it did not send, and adds it to its changes of the next round before they are ranked. This is no part of
    CELLM."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """With rounds.aggregate average: how the server changes its adapter by the mean of the clients' changes."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd: add it, times learning_rate. adamw: take it, with the other sign, for a gradient (FedAdam)."""
    learning_rate: float = field(default=1.0, metadata=key(POSITIVE))
    """Of the server's optimizer. With sgd and 1 the result is the mean of the clients' adapters."""
    weight_decay: float = field(default=0.0, metadata=key(AT_LEAST_ZERO))
    """Of adamw."""


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Federated rounds (`hecate federate`): clients train adapters of their own for some steps, which become one, with which they go on."""

    count: int = field(default=1, metadata=key(COUNT))
    """The number of rounds."""
    local_steps: int | None = field(default=None, metadata=key(COUNT))
    """The number of optimizer steps of each client in a round, in place of max_steps. Each round has a learning-rate curve of its own, and
    begins with new optimizer state. micro_batch_size and gradient_accumulation_steps are those of one client."""
    clients: tuple[ClientConfig, ...] = ()
    """The clients, as mappings {data, name, eval, r, weight}, in place of data.train and data.eval."""
    aggregate: Literal["average", "stack", "refine", "lego"] = "average"
    """What becomes of the clients' adapters (docs/use/adapters.md). average: the means of A and of B, weighted by the clients' parts; exact
    where all have the same A (lora.pairs fixed_a). A client of a smaller rank has the first r terms. stack: all terms beside each other,
    exact, of any ranks (FLoRA). refine: the means, and B corrected (LoRA-FAIR). lego: clusters of terms (LoRA-LEGO)."""
    refine: RefineConfig = field(default_factory=RefineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    merge_into_base: bool = False
    """With aggregate stack: merge each round's result into a copy of the base model, over which all clients begin with new adapters. What
    the run leaves are the terms of all rounds, as one adapter for the base model that it began with."""
    isolation: Literal["none", "process"] = "none"
    """How clients are trained. none: all at once, as experts over one base model, on the ranks that there are. process: one after another,
    each by a `hecate train` of its own that reads its data alone; nothing but the encoded update leaves it. The results are the same
    within rounding."""
    drop: tuple[str, ...] = ()
    """Drills: ROUND:CLIENT for each client that drops out of a round, whose update is then missing."""


SETTINGS = RoundsConfig
"""the section `rounds`"""


def rounds_of(config: "Config") -> RoundsConfig:
    """The section of a configuration."""
    rounds: RoundsConfig = config.rounds  # type: ignore[attr-defined]  # checkers know the core's keys alone
    return rounds


def without_rounds(config: "Config") -> "Config":
    """The configuration with the defaults of the section, as an ordinary run has them."""
    defaults: dict[str, Any] = {"rounds": RoundsConfig()}
    return replace(config, **defaults)
