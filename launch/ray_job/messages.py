"""What the controller of a Ray job and its workers tell each other: events and orders, as frozen values, and their form as JSON.

A worker sends *events*; the controller sends *orders*. Each class has a `code`, which names it in JSON.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class WorkerUp:
    """The process has imported what training needs, and takes orders. Its first event."""

    code: ClassVar[str] = "up"
    pid: int
    host: str
    gpus: str | None
    """numbers of its GPUs on the node, as CUDA_VISIBLE_DEVICES; None: not set"""
    versions: dict[str, str]
    """package -> version"""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The worker has loaded alone what a rank needs, and waits for the order `Join`."""

    code: ClassVar[str] = "prepared"


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The rank's part of the run is built, or goes on with other ranks."""

    code: ClassVar[str] = "begun"
    step: int
    """optimizer steps done"""
    sequences: tuple[int, ...]
    """of a micro-step, by rank"""
    owned: tuple[int, ...]
    """number of experts owned, by rank"""
    topology: str
    """of the ranks' devices, as YAML"""


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What all ranks know alike of the newest reported step; rank 0 reports it."""

    loss: float
    tokens_per_s: float
    imbalance: float
    bytes_sent: int
    loads: dict[str, list[int]]
    """layer -> assignments of each expert, all ranks together"""


@dataclass(frozen=True, kw_only=True)
class StepsDone:
    """Further steps have ended."""

    code: ClassVar[str] = "steps"
    step: int
    """optimizer steps done"""
    dense_tokens: int
    """tokens, with padding, that the rank took through its layers up to the experts since its last report"""
    dense_seconds: float
    """how long that took; it contains no waiting for other ranks"""
    step_seconds: float
    """mean duration of a step since the last report"""
    totals: StepTotals | None
    """None on all ranks but the first"""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete. From rank 0."""

    code: ClassVar[str] = "saved"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class LeftGeneration:
    """The rank has left its generation, and waits with its state for the order `Join`."""

    code: ClassVar[str] = "left"
    generation: int


class Outcome(Enum):
    """How training ended on a rank."""

    FINISHED = "finished"
    """all steps are done"""
    STOPPED = "stopped"
    """saved and ended as ordered"""
    USER_ERROR = "user_error"
    """configuration, data, model or disk is wrong"""
    FAILED = "failed"
    """any other exception"""


@dataclass(frozen=True, kw_only=True)
class TrainingEnded:
    """The training thread of the worker has ended."""

    code: ClassVar[str] = "ended"
    generation: int
    """-1: it was still preparing to join one"""
    outcome: Outcome
    text: str = ""
    """what went wrong, for a person"""

    @property
    def reason(self) -> str:
        """The last line of the text."""
        return (self.text.strip().splitlines() or [""])[-1]


@dataclass(frozen=True, kw_only=True)
class WorkerLost:
    """The worker's process has ended or could not start. The worker group reports it, since the worker cannot."""

    code: ClassVar[str] = "lost"
    text: str
    cannot_import: bool = False
    """a package is missing on the node"""


WorkerEvent = WorkerUp | Prepared | Begun | StepsDone | CheckpointSaved | LeftGeneration | TrainingEnded | WorkerLost


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A worker's rank in a generation, and how it meets the other ranks."""

    generation: int
    rank: int
    world_size: int
    host: str
    port: int
    """of the store where the ranks meet"""
    nodes: tuple[str, ...]
    """name of each rank's node"""
    topology: str | None
    """of the ranks' devices, as YAML; None: the ranks measure it"""
    resume: bool
    """begin from the last checkpoint"""


@dataclass(frozen=True, kw_only=True)
class TakeGpus:
    """Use these GPUs, by their numbers on the node. The process must not have used any."""

    code: ClassVar[str] = "take_gpus"
    gpus: str


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Begin training as this rank, from the last checkpoint or from nothing."""

    code: ClassVar[str] = "begin"
    assignment: Assignment


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Load alone what a rank needs. The order `Join` follows."""

    code: ClassVar[str] = "prepare"


@dataclass(frozen=True, kw_only=True)
class Join:
    """Go on in the next generation, with the state that the waiting rank has or receives."""

    code: ClassVar[str] = "join"
    assignment: Assignment


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Leave the generation after the step under way, and wait for the next one."""

    code: ClassVar[str] = "leave"


@dataclass(frozen=True, kw_only=True)
class Interrupt:
    """Break off the messages under way: a rank of the generation is lost, and nothing else may show it to this rank."""

    code: ClassVar[str] = "interrupt"
    generation: int


@dataclass(frozen=True, kw_only=True)
class Replan:
    """Change speeds and shares after the step under way. Sent to rank 0, which tells the others."""

    code: ClassVar[str] = "replan"
    generation: int
    number: int
    """counts the job's orders of this kind from 1; the newest counts"""
    flops: tuple[float, ...]
    """of each rank's device, for the plans from now on"""
    sequences: tuple[int, ...]
    """of each micro-step, by rank"""
    reshard: bool
    """move experts to better owners if that pays"""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Save and end after the step under way."""

    code: ClassVar[str] = "stop"


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Does nothing: a worker that has carried it out is alive."""

    code: ClassVar[str] = "ping"


WorkerOrder = TakeGpus | Begin | Prepare | Join | Leave | Interrupt | Replan | Stop | Ping
_CLASSES: dict[str, type] = {kind.code: kind for kind in (*get_args(WorkerEvent), *get_args(WorkerOrder))}


def to_json(message: WorkerEvent | WorkerOrder) -> dict[str, Any]:
    """The message as JSON values: its fields, and its `code`."""
    return {"code": message.code, **asdict(message, dict_factory=_plain)}


def event_from_json(raw: Mapping[str, Any]) -> WorkerEvent:
    """The event that `to_json` was given.

    Raises:
        ValueError: it is none.
    """
    message = _from_json(raw)
    if not isinstance(message, WorkerEvent):
        raise ValueError(f"{raw.get('code')}: is no event")
    return message


def order_from_json(raw: Mapping[str, Any]) -> WorkerOrder:
    """The order that `to_json` was given.

    Raises:
        ValueError: it is none.
    """
    message = _from_json(raw)
    if not isinstance(message, WorkerOrder):
        raise ValueError(f"{raw.get('code')}: is no order")
    return message


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, Enum) else value for name, value in items}


def _from_json(raw: Mapping[str, Any]) -> Any:
    kind = _CLASSES.get(raw["code"]) if isinstance(raw, Mapping) and "code" in raw else None
    if kind is None:
        raise ValueError("a message without a known code")
    return _value(kind, {name: value for name, value in raw.items() if name != "code"})


def _value(kind: Any, raw: Any) -> Any:
    """A field's value of type `kind`: JSON knows neither tuples, nor enums, nor these classes."""
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (choice for choice in get_args(kind) if choice is not type(None))
        return None if raw is None else _value(inner, raw)
    if is_dataclass(kind) and isinstance(kind, type):
        hints, names = get_type_hints(kind), {field.name for field in fields(kind)}
        if not isinstance(raw, Mapping) or not set(raw) <= names:
            raise ValueError(f"{kind.__name__}: has other fields")
        try:
            return kind(**{name: _value(hints[name], value) for name, value in raw.items()})
        except TypeError as error:
            raise ValueError(str(error)) from None
    if get_origin(kind) is tuple:
        return tuple(raw)
    return kind(raw) if isinstance(kind, type) and issubclass(kind, Enum) else raw
