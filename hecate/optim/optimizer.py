"""The step of owned expert chunks and replicated parameters by a gradient rule, with one global gradient norm; and its learning rate.

An expert's master parameters and what the rule keeps of them, such as moments, exist on its owner alone, or also as a *backup* on a second
rank (`fssdp.redundancy`), which steps the backup with the owner's gradient. Replicated parameters (routers, attention adapters) are stepped
by every rank alike; of those that tensor parallelism cuts, each rank steps its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.engine.protocol import ExpertEngine
from hecate.experts.routers.router import Router
from hecate.model.moe_model import MoeModel
from hecate.model.parameter_parts import TensorParts
from hecate.optim.rule import GradientRule, Stepped, kind_of_parameter
from hecate.parallel.comm.reshard import RowSpec
from hecate.parallel.values.layout import TensorSpec
from hecate.parallel.values.optimizer_state import ParameterSpec
from hecate.parallel.values.units import Unit, expert_name

MASTER = "master"


def schedule(
    kind: str, max_steps: int, warmup_ratio: float, *, min_lr_rate: float = 0.0, decay_ratio: float = 0.0
) -> Callable[[int], float]:
    """The factor of the peak learning rate in step 0, 1, ...

    Linear warm-up lasts ceil(warmup_ratio * max_steps) steps, as in transformers, and its first step is not zero. After it the factors are
    those of transformers' schedules.

    Args:
        kind: a value of lr_scheduler_type: what follows the warm-up.
        min_lr_rate: the factor after the last step, of cosine_with_min_lr and wsd.
        decay_ratio: the share of the steps, at the end, in which wsd falls.
    """
    warmup = math.ceil(warmup_ratio * max_steps)
    start = max_steps - math.ceil(decay_ratio * max_steps) if kind == "wsd" else warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step < start or kind.startswith("constant"):
            return 1.0
        if kind == "inverse_sqrt":
            return 1 / math.sqrt(1 + (step - warmup) / (warmup or 10_000))
        done = min(1.0, (step - start) / max(1, max_steps - start))
        if kind == "linear":
            return 1 - done
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return cosine if kind == "cosine" else min_lr_rate + (1 - min_lr_rate) * cosine

    return factor


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each step."""

    peak: float
    factor: Callable[[int], float] = lambda _: 1.0
    """The factor of the peak in step 0, 1, ... (`schedule`)."""

    def of(self, step: int) -> float:
        return self.peak * self.factor(step)


@dataclass(frozen=True)
class Trainables:
    """The parameters that one rank steps when it begins; owned experts change with `ExpertOptimizer.replace_owned`."""

    owned: dict[str, nn.Parameter]
    """The master chunks of the experts that this rank owns, by LAYER.EXPERT."""
    replicated: dict[str, nn.Parameter]
    """The parameters that are the same on every rank."""
    parts: TensorParts | None = None
    """The parameters that tensor parallelism cuts; None: there are none."""
    chunks: Mapping[Unit, tuple[TensorSpec, ...]] = field(default_factory=dict)
    """The tensors in the chunk of a unit's expert, for rules that tell them apart."""
    routers: Mapping[Unit, Router] = field(default_factory=dict)
    """The routers whose buffers change after a step."""
    separate: int = 0
    """The number of experts, if each is an adapter of its own, which is clipped by its own norm over all layers; otherwise 0."""

    @staticmethod
    def of(moe: MoeModel) -> Trainables:
        """What trains of a model, with the experts that this rank owns now."""
        chunks = {unit: chunked.layout().trainable for unit, chunked in moe.engine.shards.chunked.items()}
        return Trainables(
            owned_parameters(moe.engine), moe.replicated_parameters(), moe.parts, chunks, moe.router_modules, moe.separate_experts
        )


def owned_parameters(engine: ExpertEngine) -> dict[str, nn.Parameter]:
    """LAYER.EXPERT -> master chunk, of the experts that this rank owns now."""
    return {expert_name(unit, expert): parameter for (unit, expert), parameter in engine.shards.named_parameters().items()}


class ExpertOptimizer:
    """Steps owned experts, replicated parameters, parts and backups by a rule, and holds what the rule keeps of each."""

    def __init__(self, trainables: Trainables, rule: GradientRule, learning_rate: LearningRate, device: torch.device) -> None:
        """A rank may have nothing that trains; `device` says where its share of the norm is summed."""
        self.owned = trainables.owned
        self.backups: dict[str, nn.Parameter] = {}
        """Further copies of experts that other ranks own, by the same names; stepped, but counted in no norm and saved nowhere."""
        self.replicated = trainables.replicated
        self.parts = trainables.parts
        self.buffers = {
            f"layers.{unit}.router.{name}": buffer for unit, router in trainables.routers.items() for name, buffer in router.named_buffers()
        }
        """What routers change after a step: the same on every rank, saved beside `replicated` and without state."""
        self._routers = trainables.routers
        self.separate = trainables.separate
        """The number of separate experts (`Trainables.separate`)."""
        assert not self.separate or not self.replicated, "adapters that must not influence one another share parameters"
        self.gradients_complete = False
        """Whether all gradients of the step under way are summed over the job's ranks, so that only the norm is missing."""
        self.last_norm = math.nan
        """The global norm with which the last step was taken, or skipped."""
        self.last_norms = (math.nan,) * self.separate
        """The norms of the separate experts with which the last step was taken, or skipped."""
        self.steps_done = 0
        """The number of steps taken or skipped, which is the position in the schedule."""
        self._rule, self.schedule = rule, learning_rate
        self._device = device
        self._chunks = {str(unit): specs for unit, specs in trainables.chunks.items()}
        self._state: dict[Tensor, dict[str, Tensor]] = {}
        """What the rule keeps of each parameter that was ever stepped."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.of(self.steps_done)

    def reduce_replicated(self, group: dist.ProcessGroup) -> None:
        """Sum the replicated parameters' gradients over all ranks, and each part's over those that have it. Every rank must call it."""
        _sum_gradients(list(self.replicated.values()), group)
        if self.parts:
            _sum_gradients(list(self.parts.parameters.values()), self.parts.groups.data)

    def take_replicated(self) -> Tensor:
        """[numbers of all replicated parameters]: their gradients, one after another. They have none afterwards."""
        parameters = list(self.replicated.values())
        flat = _flat_gradients(parameters) if parameters else torch.empty(0, device=self._device)
        for parameter in parameters:
            parameter.grad = None
        return flat

    def give_replicated(self, flat: Tensor) -> None:
        """Give the replicated parameters gradients, laid out as `take_replicated` returns them."""
        _give_gradients(list(self.replicated.values()), flat)

    def squares(self, *, counts_owned: bool = True, names: Sequence[str] = ()) -> Tensor:
        """float64 [2], on the device: the sums of the squares of this rank's gradients, of what only some ranks have and of what all have.

        The square of the global norm is the first, added up over the ranks, plus the second of any rank. With separate experts the first
        is a number for each of them, over all layers: float64 [experts + 1].

        Args:
            counts_owned: false in all sharding groups but one, which own the same.
            names: the names of all experts of the job. If they are given, the first is a number for each name: float64 [names + 1].
        """
        # If a rank is lost from now on, the others can still take this step with the norm of a rank that has taken it (`catch_up`).
        self.gradients_complete = True
        owned = self.owned if counts_owned else {}
        if names:
            each = [_sum_of_squares({name: owned[name]} if name in owned else {}, self._device) for name in names]
            return torch.stack([*each, _sum_of_squares(self.replicated, self._device)])
        if self.separate:
            parts = [{name: parameter for name, parameter in owned.items() if _number(name) == expert} for expert in range(self.separate)]
            return torch.stack([_sum_of_squares(part, self._device) for part in [*parts, self.replicated]])
        total = _sum_of_squares(owned, self._device)
        if self.parts and self.parts.groups.dp_rank == 0:
            total += _sum_of_squares(self.parts.parameters, self._device)
        return torch.stack([total, _sum_of_squares(self.replicated, self._device)])

    def squares_by_expert(self, squares: Sequence[float], names: Sequence[str]) -> Sequence[float]:
        """The sums of squares of each separate expert over all layers, from those by these names; the given ones if nothing is separate."""
        if not self.separate or not names:
            return squares
        return [
            sum(square for name, square in zip(names, squares, strict=True) if _number(name) == expert) for expert in range(self.separate)
        ]

    @property
    def alike(self) -> dict[str, Tensor]:
        """What every rank holds alike, by name: replicated parameters, and the routers' buffers."""
        return {**self.replicated, **self.buffers}

    def step(
        self,
        grad_norm: float,
        max_grad_norm: float | None,
        loads: Mapping[Unit, np.ndarray] | None = None,
        norms: Sequence[float] = (),
        skip_above: float = math.inf,
    ) -> bool:
        """Clip by the global norm and step. With a norm that is not finite or a spike nothing is changed, but the schedule moves on.

        Parameters without a gradient (idle experts) are left untouched. Separate experts are clipped, or left untouched, by norms of
        their own.

        Args:
            loads: of the step, as `TrainingStep.finish` returns them, for the routers; needed if there are any.
            norms: of the separate experts; needed if there are any.
            skip_above: a larger global norm is a spike (`hecate.optim.norm_limit`); no limit where there are separate experts.

        Returns:
            Whether a step was taken; of separate experts, by all of them.
        """
        taken = steps = math.isfinite(grad_norm) and grad_norm <= skip_above
        if self.separate:
            assert len(norms) == self.separate, (norms, self.separate)
            assert math.isinf(skip_above), skip_above
            taken, steps = all(map(math.isfinite, norms)), any(map(math.isfinite, norms))
            self._clip_each(norms, max_grad_norm)
            self.last_norms = tuple(norms)
        if steps:
            gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            if gradients and max_grad_norm is not None and grad_norm > max_grad_norm and not self.separate:
                torch._foreach_mul_(gradients, min(1.0, max_grad_norm / (grad_norm + 1e-6)))
            with torch.no_grad():
                self._rule.step(self._stepped(), self.learning_rate)
                for unit, router in self._routers.items():
                    assert loads is not None, "routers change after a step by its loads"
                    router.after_step(torch.from_numpy(loads[unit].sum(1)))
        self.last_norm = grad_norm
        self.steps_done += 1
        self.abandon()
        return taken

    def _clip_each(self, norms: Sequence[float], limit: float | None) -> None:
        """Clip each separate expert by its norm, and take away the gradients of those whose norm is not finite."""
        scaled: list[Tensor] = []
        factors: list[float] = []
        for name, parameter in [*self.owned.items(), *self.backups.items()]:
            norm = norms[_number(name)]
            if not math.isfinite(norm):
                parameter.grad = None
            elif parameter.grad is not None and limit is not None and norm > limit:
                scaled.append(parameter.grad)
                factors.append(min(1.0, limit / (norm + 1e-6)))
        if scaled:
            torch._foreach_mul_(scaled, factors)

    def abandon(self) -> None:
        """Forget the gradients of the step under way."""
        for parameter in self._parameters():
            parameter.grad = None
        self.gradients_complete = False

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by stable names: `owned/NAME` and `replicated/NAME`, each with its state, as NAME/exp_avg.

        A parameter that was never stepped has no state. Parts are put together as `replicated/NAME`, so that a checkpoint does not
        depend on the tensor group's size; every rank must then call it, and the first of each tensor group gets them.
        """
        tensors: dict[str, Tensor] = {}
        for kind, held in (("owned", self.owned), ("replicated", self.alike)):
            for name, parameter in held.items():
                tensors[f"{kind}/{name}"] = parameter.detach()
                tensors |= {f"{kind}/{name}/{key}": tensor for key, tensor in self._state.get(parameter, {}).items()}
        for name, parameter in self.parts.parameters.items() if self.parts else ():
            state = {f"replicated/{name}/{key}": tensor for key, tensor in self._state.get(parameter, {}).items()}
            for key, tensor in {f"replicated/{name}": parameter, **state}.items():
                whole = self.parts.whole(name, tensor) if self.parts and tensor.shape == parameter.shape else tensor
                if self.parts and self.parts.groups.tp_rank == 0:
                    tensors[key] = whole
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Continue from `state_tensors`, after so many steps."""
        with torch.no_grad():
            for kind, held in (("owned", self.owned), ("replicated", self.alike)):
                for name, parameter in held.items():
                    parameter.copy_(tensors[f"{kind}/{name}"])
                    state = {key: f"{kind}/{name}/{key}" for key in self._kept(name, parameter)}
                    self.set_state(parameter, {key: tensors[saved].clone() for key, saved in state.items() if saved in tensors})
            for name, parameter in self.parts.parameters.items() if self.parts else ():
                self._load_part(name, parameter, tensors)
        self.steps_done = steps_done

    def _load_part(self, name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        assert self.parts is not None
        value = self.parts.part_of(name, tensors[f"replicated/{name}"]).contiguous()
        state = {}
        for key, spec in self._kept(name, value).items():
            if (saved := tensors.get(f"replicated/{name}/{key}")) is not None:
                state[key] = self.parts.part_of(name, saved).contiguous() if spec.shape == tuple(value.shape) else saved.clone()
        parameter.copy_(value)
        self.set_state(parameter, state)

    def row(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter as its owner and its backup rank have it: `MASTER`, and its state if it was ever stepped."""
        return {MASTER: parameter.detach(), **self._state.get(parameter, {})}

    def row_specs(self, name: str, parameter: Tensor) -> dict[str, RowSpec]:
        """What `row` holds for a parameter of this name like this one, once it was stepped."""
        return {MASTER: RowSpec(tuple(parameter.shape), parameter.dtype), **self._kept(name, parameter)}

    def chunk_specs(self, unit: Unit, chunks: Tensor) -> dict[str, RowSpec]:
        """`row_specs` of each expert of a unit. chunks: [experts, numbers]."""
        return self.row_specs(expert_name(unit, 0), chunks.new_empty(chunks.shape[1:], device="meta"))

    def replace_owned(
        self, owned: dict[str, nn.Parameter], states: Mapping[str, Mapping[str, Tensor]], *, keep_leaving: bool = False
    ) -> None:
        """Step `owned` from now on in place of the parameters owned so far.

        A parameter that was owned before keeps its state; another takes the one of its name in `states`, and has none if there is none.
        The order of `owned` is the order in which the norm is summed.

        Args:
            keep_leaving: what is owned no longer becomes a backup. No step may be taken before `replace_backups` has taken it away.
        """
        leaving = {name: parameter for name, parameter in self.owned.items() if name not in owned} if keep_leaving else {}
        states_of_leaving = {name: self._state.get(parameter, {}) for name, parameter in leaving.items()}
        self._replace(self.owned, owned, states)
        self.owned = owned
        self.replace_backups({**self.backups, **leaving}, states_of_leaving)

    def replace_backups(self, backups: dict[str, nn.Parameter], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """`replace_owned` for backups."""
        self._replace(self.backups, backups, states)
        self.backups = backups

    def _replace(self, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        kept = {name for name, parameter in after.items() if before.get(name) is parameter}
        for name, parameter in before.items():
            if name not in kept:
                self._state.pop(parameter, None)
        for name, parameter in after.items():
            if name not in kept and states.get(name):
                self.set_state(parameter, states[name])

    def set_state(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Replace what the rule keeps of a parameter; an empty mapping means that it was never stepped."""
        self._state.pop(parameter, None)
        if state:
            self._state[parameter] = {key: _laid_out(value, parameter) for key, value in state.items()}

    def _stepped(self) -> list[Stepped]:
        """The parameters that have a gradient; those that are stepped for the first time get their state."""
        experts = [*self.owned.items(), *self.backups.items()]
        others = self.replicated | (self.parts.parameters if self.parts else {})
        return [
            Stepped(name, parameter, parameter.grad, self._state_of(name, parameter), spec.kind, spec.chunk)
            for name, parameter in [*experts, *others.items()]
            if parameter.grad is not None
            for spec in [self._spec(name, parameter)]
        ]

    def _spec(self, name: str, parameter: Tensor) -> ParameterSpec:
        unit = name.rpartition(".")[0]
        is_expert = unit in self._chunks or name in self.owned or name in self.backups
        return ParameterSpec(tuple(parameter.shape), None if is_expert else kind_of_parameter(name, parameter), self._chunks.get(unit, ()))

    def _kept(self, name: str, parameter: Tensor) -> dict[str, RowSpec]:
        """What the rule keeps of a parameter of this name like this one, in the order in which it travels."""
        specs = self._rule.state_specs(self._spec(name, parameter))
        return {key: RowSpec(spec.shape, getattr(torch, spec.dtype) if spec.dtype else parameter.dtype) for key, spec in specs.items()}

    def _state_of(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self._state:
            self._state[parameter] = {
                # In the parameter's strides, as torch's own optimizers have it.
                key: torch.zeros_like(parameter, dtype=spec.dtype)
                if spec.shape == tuple(parameter.shape)
                else torch.zeros(spec.shape, dtype=spec.dtype, device=parameter.device if spec.shape else "cpu")
                for key, spec in self._kept(name, parameter).items()
            }
        return self._state[parameter]

    def _parameters(self) -> list[nn.Parameter]:
        parts = self.parts.parameters if self.parts else {}
        return [*self.owned.values(), *self.replicated.values(), *parts.values(), *self.backups.values()]


def _number(name: str) -> int:
    """The expert's number in its unit, from its name."""
    return int(name.rpartition(".")[2])


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A value of a parameter's state where the parameter is, and in its strides, for the same reason as `_give_gradients`."""
    if not value.dim():
        return value.cpu()
    moved = value.to(parameter.device)
    if moved.shape != parameter.shape or moved.stride() == parameter.stride():
        return moved
    return torch.empty_like(parameter, dtype=moved.dtype).copy_(moved)


def _sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    if not parameters:
        return
    flat = _flat_gradients(parameters)
    dist.all_reduce(flat, group=group)
    _give_gradients(parameters, flat)


def _flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def _give_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        # In the parameter's strides, because torch's fused steps go through memory and not through indices.
        parameter.grad = (
            total.view_as(parameter) if parameter.is_contiguous() else torch.empty_like(parameter).copy_(total.view_as(parameter))
        )


def _sum_of_squares(parameters: dict[str, nn.Parameter], device: torch.device) -> Tensor:
    """float64 scalar. On a GPU a few kernels compute all parameters at once; on the CPU that would be no faster."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cuda":
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum() if gradients else total
    for gradient in gradients:
        total += gradient.square().sum(dtype=torch.float64)
    return total
