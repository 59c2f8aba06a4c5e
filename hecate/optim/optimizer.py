"""AdamW over owned expert chunks and replicated parameters, with one global gradient norm; and the learning rate of each step.

An expert's master parameters and moments exist on its owner alone, or also as a *backup* on a second rank (`fssdp.redundancy`), which
steps the backup with the owner's gradient. Replicated parameters (routers, attention adapters) are stepped by every rank alike; of those
that tensor parallelism cuts, each rank steps its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.engine.protocol import ExpertEngine
from hecate.model.parameter_parts import TensorParts
from hecate.parallel.comm.reshard import RowSpec
from hecate.parallel.units import expert_name

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
MASTER = "master"


def schedule(kind: str, max_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """The factor of the peak learning rate in step 0, 1, ...

    Linear warm-up lasts ceil(warmup_ratio * max_steps) steps, as in transformers, and its first step is not zero; cosine and linear
    reach zero after the last step.

    Args:
        kind: cosine, linear or constant: what follows the warm-up.
    """
    warmup = math.ceil(warmup_ratio * max_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if kind == "linear" else 1.0

    return factor


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """What the configuration says about the optimizer."""

    learning_rate: float
    """at its peak"""
    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    exclude: tuple[str, ...] = ()
    """kinds of parameters without weight decay: norms, biases, routers (`kind_of_parameter`)"""
    factor: Callable[[int], float] = lambda _: 1.0
    """of the peak learning rate in step 0, 1, ... (`schedule`)"""


def kind_of_parameter(name: str, parameter: Tensor) -> str | None:
    """`routers`, `biases` or `norms`, or None for another matrix. `name` is what checkpoints call a replicated parameter."""
    if name.endswith(".router"):
        return "routers"
    if name.endswith(".bias"):
        return "biases"
    return "norms" if parameter.dim() == 1 else None


@dataclass(frozen=True)
class Trainables:
    """The parameters that one rank steps when it begins; owned experts change with `ExpertOptimizer.replace_owned`."""

    owned: dict[str, nn.Parameter]
    """LAYER.EXPERT -> master chunk, of the experts that this rank owns"""
    replicated: dict[str, nn.Parameter]
    """the same on every rank"""
    parts: TensorParts | None = None
    """what tensor parallelism cuts"""


def owned_parameters(engine: ExpertEngine) -> dict[str, nn.Parameter]:
    """LAYER.EXPERT -> master chunk, of the experts that this rank owns now."""
    return {expert_name(unit, expert): parameter for (unit, expert), parameter in engine.shards.named_parameters().items()}


class ExpertOptimizer:
    """torch's AdamW over owned experts, replicated parameters, parts and backups."""

    def __init__(self, trainables: Trainables, settings: AdamWSettings, device: torch.device) -> None:
        """A rank may have nothing that trains; `device` says where its share of the norm is summed."""
        self.owned = trainables.owned
        self.backups: dict[str, nn.Parameter] = {}
        """second copies of experts that other ranks own, by the same names; stepped, but counted in no norm and saved nowhere"""
        self.replicated = trainables.replicated
        self.parts = trainables.parts
        self.gradients_complete = False
        """every gradient of the step under way is what the job's ranks have summed: only the norm is missing"""
        self.last_norm = math.nan
        """the global norm that the last step was taken, or skipped, with"""
        self.steps_done = 0
        """steps taken or skipped: the position in the schedule"""
        self._settings = settings
        self._device = device
        # On the CPU the fused step is one pass instead of ten; on a GPU it would keep the count of steps there.
        self._fused = device.type == "cpu"
        # Groups, and not a list: torch refuses an empty list.
        groups: list[dict[str, Any]] = [{"params": self._decayed()}, {"params": self._undecayed(), "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=self._fused,
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self._settings.learning_rate * self._settings.factor(self.steps_done)

    def reduce_replicated(self, group: dist.ProcessGroup) -> None:
        """Sum the replicated parameters' gradients over all ranks, and each part's over those that have it. Every rank must call it."""
        _sum_gradients(list(self.replicated.values()), group)
        if self.parts:
            _sum_gradients(list(self.parts.parameters.values()), self.parts.groups.data)

    def global_grad_norm(self, group: dist.ProcessGroup, *, counts_owned: bool = True) -> float:
        """The norm of all gradients, each sharded and each replicated parameter counted once. Every rank must call it.

        Args:
            group: of all ranks, so that all get the same bits.
            counts_owned: false in all sharding groups but one, which own the same.
        """
        self.gradients_complete = True
        total = _sum_of_squares(self.owned if counts_owned else {}, self._device)
        if self.parts and self.parts.groups.dp_rank == 0:
            total += _sum_of_squares(self.parts.parameters, self._device)
        dist.all_reduce(total, group=group)
        return math.sqrt((total + _sum_of_squares(self.replicated, self._device)).item())

    def step(self, grad_norm: float, max_grad_norm: float | None) -> bool:
        """Clip by the global norm and step. With a norm that is not finite nothing is changed, but the schedule moves on.

        Parameters without a gradient (idle experts) are left untouched.

        Returns:
            Whether a step was taken.
        """
        taken = math.isfinite(grad_norm)
        if taken:
            if max_grad_norm is not None and grad_norm > max_grad_norm:
                nn.utils.clip_grads_with_norm_(self._parameters(), max_grad_norm, torch.tensor(grad_norm, dtype=torch.float64))
            for group in self._adamw.param_groups:
                group["lr"] = self.learning_rate
            self._adamw.step()
        self.last_norm = grad_norm
        self.steps_done += 1
        self.abandon()
        return taken

    def abandon(self) -> None:
        """Forget the gradients of the step under way."""
        self._adamw.zero_grad(set_to_none=True)
        self.gradients_complete = False

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by stable names: `owned/NAME` and `replicated/NAME`, each with its moments.

        A parameter that was never stepped has no moments. Parts are put together as `replicated/NAME`, so that a checkpoint does not
        depend on the tensor group's size; every rank must then call it, and the first of each tensor group gets them.
        """
        tensors: dict[str, Tensor] = {}
        for kind, parameters in (("owned", self.owned), ("replicated", self.replicated)):
            for name, parameter in parameters.items():
                tensors[f"{kind}/{name}"] = parameter.detach()
                for key in MOMENTS:
                    if parameter in self._adamw.state:
                        tensors[f"{kind}/{name}/{key}"] = self._adamw.state[parameter][key]
        for name, parameter in self.parts.parameters.items() if self.parts else ():
            state = {f"replicated/{name}/{key}": self._adamw.state[parameter][key] for key in MOMENTS if parameter in self._adamw.state}
            for key, tensor in {f"replicated/{name}": parameter, **state}.items():
                whole = self.parts.whole(name, tensor) if self.parts and tensor.dim() else tensor
                if self.parts and self.parts.groups.tp_rank == 0:
                    tensors[key] = whole
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Continue from `state_tensors`, after so many steps."""
        with torch.no_grad():
            for kind, parameters in (("owned", self.owned), ("replicated", self.replicated)):
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[f"{kind}/{name}"])
                    stepped = f"{kind}/{name}/step" in tensors
                    self.set_moments(parameter, {key: tensors[f"{kind}/{name}/{key}"].clone() for key in MOMENTS} if stepped else {})
            for name, parameter in self.parts.parameters.items() if self.parts else ():
                self._load_part(name, parameter, tensors)
        self.steps_done = steps_done

    def _load_part(self, name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        assert self.parts is not None
        mine = {key: tensors.get(f"replicated/{name}{key and '/'}{key}") for key in ("", *MOMENTS)}
        cut = {
            key: self.parts.part_of(name, value).contiguous() if value.dim() else value.clone()
            for key, value in mine.items()
            if value is not None
        }
        parameter.copy_(cut.pop(""))
        self.set_moments(parameter, cut)

    def row(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """An expert's state on its owner or backup rank: `MASTER`, and the moments if it was ever stepped."""
        state = self._adamw.state.get(parameter, {})
        return {MASTER: parameter.detach(), **{key: state[key] for key in MOMENTS if key in state}}

    def row_specs(self, chunk: RowSpec) -> dict[str, RowSpec]:
        """What `row` holds for a parameter like `chunk`, once it was stepped."""
        # torch counts steps in its default dtype, but never in one narrower than float32, and in that when fused.
        count = torch.float64 if torch.get_default_dtype() == torch.float64 and not self._fused else torch.float32
        return {MASTER: chunk, **{key: RowSpec((), count) if key == "step" else chunk for key in MOMENTS}}

    def replace_owned(self, owned: dict[str, nn.Parameter], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Step `owned` from now on in place of the parameters owned so far.

        A parameter that was owned before keeps its moments; another takes those of its name in `moments`, and has none if there are none.
        The order of `owned` is the order in which the norm is summed.
        """
        self._replace(self.owned, owned, moments)
        self.owned = owned
        self._adamw.param_groups[0]["params"] = self._decayed()

    def replace_backups(self, backups: dict[str, nn.Parameter], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """`replace_owned` for backups."""
        self._replace(self.backups, backups, moments)
        self.backups = backups
        self._adamw.param_groups[0]["params"] = self._decayed()

    def _replace(
        self, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter], moments: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        kept = {name for name, parameter in after.items() if before.get(name) is parameter}
        for name, parameter in before.items():
            if name not in kept:
                self._adamw.state.pop(parameter, None)
        for name, parameter in after.items():
            if name not in kept and moments.get(name):
                self.set_moments(parameter, moments[name])

    def set_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        """Replace a parameter's moments; an empty mapping means that it was never stepped."""
        self._adamw.state.pop(parameter, None)
        if moments:
            # torch keeps the count of steps on the CPU.
            self._adamw.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}

    def _parameters(self) -> list[nn.Parameter]:
        parts = self.parts.parameters if self.parts else {}
        return [*self.owned.values(), *self.replicated.values(), *parts.values(), *self.backups.values()]

    def _undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay. An expert's chunk holds matrices only, so none of them is an expert's."""
        named = self.replicated | (self.parts.parameters if self.parts else {})
        return [parameter for name, parameter in named.items() if kind_of_parameter(name, parameter) in self._settings.exclude]

    def _decayed(self) -> list[nn.Parameter]:
        undecayed = {id(parameter) for parameter in self._undecayed()}
        return [parameter for parameter in self._parameters() if id(parameter) not in undecayed]


def _sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    if not parameters:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat, group=group)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter)


def _sum_of_squares(parameters: dict[str, nn.Parameter], device: torch.device) -> Tensor:
    """float64 scalar. torch's own norms add up float32 squares in float32, which rounds otherwise."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters.values():
        if parameter.grad is not None:
            total += parameter.grad.square().sum(dtype=torch.float64)
    return total
