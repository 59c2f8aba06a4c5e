"""The messages between the controller of a Ray job and its workers, as frozen values, and their form as JSON.

A worker sends *events*; the controller sends *orders*. Each class has a `code`, which names it in JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, get_args

from hecate.io.json_records import from_json_values, to_json_values
from hecate.io.strict_json import JsonError


@dataclass(frozen=True, kw_only=True)
class WorkerUp:
    """A worker's first event: its process has imported what training needs, and takes orders."""

    code: ClassVar[str] = "up"
    pid: int
    host: str
    gpus: str | None
    """numbers of its GPUs on the node, as CUDA_VISIBLE_DEVICES; None: not set"""
    versions: dict[str, str]
    """package -> version"""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The worker has loaded by itself what a rank needs, and waits for the order `Join`."""

    code: ClassVar[str] = "prepared"


@dataclass(frozen=True, kw_only=True)
class PartBuilt:
    """The rank has built its part of the run, or goes on with other ranks."""

    code: ClassVar[str] = "begun"
    step: int
    """the number of optimizer steps done"""
    max_steps: int
    """the number of optimizer steps of the run"""
    sequences: tuple[int, ...]
    """the number of sequences in a micro-step, by rank"""
    owned: tuple[int, ...]
    """the number of experts owned, by rank"""
    topology: str
    """the topology of the ranks' devices, as YAML"""


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Figures of the newest step that are the same on all ranks. Rank 0 sends them, at most once a second."""

    code: ClassVar[str] = "totals"
    step: int
    """number of optimizer steps done"""
    loss: float
    tokens_per_s: float
    imbalance: float
    bytes_sent: int
    loads: dict[str, list[int]]
    """a layer -> the assignments of all ranks to each expert"""


@dataclass(frozen=True, kw_only=True)
class StepsDone:
    """The rank has done further steps since its last report."""

    code: ClassVar[str] = "steps"
    step: int
    """number of optimizer steps done"""
    dense_tokens: int
    """number of tokens, with padding, that the rank took through its layers up to the experts since its last report"""
    dense_seconds: float
    """how long that took; this contains no waiting for other ranks"""
    step_seconds: float
    """mean duration of a step since the last report"""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete. Rank 0 sends this."""

    code: ClassVar[str] = "saved"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class LeftGeneration:
    """The rank has left its generation with its state, and waits for the order `Join`."""

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
    """the number of the generation; -1: the worker was still preparing to join one"""
    outcome: Outcome
    text: str = ""
    """what went wrong, in words"""

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


WorkerEvent = WorkerUp | Prepared | PartBuilt | StepTotals | StepsDone | CheckpointSaved | LeftGeneration | TrainingEnded | WorkerLost


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A worker's rank in a generation."""

    generation: int
    rank: int
    world_size: int
    nodes: tuple[str, ...]
    """name of each rank's node"""
    topology: str | None
    """topology of the ranks' devices, as YAML; None: the ranks measure it"""
    resume: bool
    """whether to begin from the last checkpoint"""


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
    """Load by itself what a rank needs. The order `Join` follows."""

    code: ClassVar[str] = "prepare"


@dataclass(frozen=True, kw_only=True)
class Join:
    """Go on in the next generation, with the state that the waiting rank has kept or receives from another rank."""

    code: ClassVar[str] = "join"
    assignment: Assignment


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Leave the generation after the step under way, and wait for the next one."""

    code: ClassVar[str] = "leave"


@dataclass(frozen=True, kw_only=True)
class Interrupt:
    """Break off the collectives under way, because a rank of the generation is lost and this rank may not notice it by itself."""

    code: ClassVar[str] = "interrupt"
    generation: int


@dataclass(frozen=True, kw_only=True)
class Replan:
    """Change the planned speeds and the ranks' shares after the step under way. Rank 0 receives this order and broadcasts it."""

    code: ClassVar[str] = "replan"
    generation: int
    number: int
    """the number of the order among the job's orders of this kind, from 1; only the newest is valid"""
    flops: tuple[float, ...]
    """the FLOP/s of each rank's device, for the plans from now on"""
    sequences: tuple[int, ...]
    """the number of sequences in a micro-step, by rank"""
    reshard: bool
    """whether to move experts to better owners if that pays"""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Save and end after the step under way."""

    code: ClassVar[str] = "stop"


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Do nothing. A worker that has carried this out is alive."""

    code: ClassVar[str] = "ping"


WorkerOrder = TakeGpus | Begin | Prepare | Join | Leave | Interrupt | Replan | Stop | Ping
_CLASSES: dict[str, type] = {kind.code: kind for kind in (*get_args(WorkerEvent), *get_args(WorkerOrder))}


def message_json(message: WorkerEvent | WorkerOrder) -> dict[str, Any]:
    """The message as JSON values: its fields, and its `code`."""
    return {"code": message.code, **to_json_values(message)}


def event_from_json(raw: Any) -> WorkerEvent:
    """Read an event that `to_json` has written.

    Raises:
        JsonError: the value is no event.
    """
    message = _from_json(raw)
    if not isinstance(message, WorkerEvent):
        raise JsonError(f"the message {message.code!r} is no event")
    return message


def order_from_json(raw: Any) -> WorkerOrder:
    """Read an order that `to_json` has written.

    Raises:
        JsonError: the value is no order.
    """
    message = _from_json(raw)
    if not isinstance(message, WorkerOrder):
        raise JsonError(f"the message {message.code!r} is no order")
    return message


def _from_json(raw: Any) -> Any:
    code = raw.get("code") if isinstance(raw, Mapping) else None
    kind = _CLASSES.get(code) if isinstance(code, str) else None
    if kind is None:
        raise JsonError("a message without a known code")
    return from_json_values(kind, {name: value for name, value in raw.items() if name != "code"})
