"""AdamW over owned expert chunks and replicated parameters, with one global gradient norm.

An expert's master parameters and moments exist on its owner alone, or as a *backup* on a second rank as well (`fssdp.redundancy`), which
steps it with the owner's gradient. Replicated parameters (routers, attention adapters) are stepped by every rank alike, and of those under
tensor parallelism each rank steps its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.model.tensor_parts import TensorParts
from hecate.parallel.comm.reshard import RowSpec

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
MASTER = "master"


class ExpertOptimizer:
    """torch's AdamW and its schedule, over both kinds of parameters."""

    def __init__(
        self,
        owned: dict[str, nn.Parameter],
        replicated: dict[str, nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        schedule: Callable[[int], float],
        parts: TensorParts | None = None,
    ) -> None:
        self.owned = owned
        self.backups: dict[str, nn.Parameter] = {}
        """second copies of experts that other ranks own, by the same names; stepped, but counted in no norm and saved nowhere"""
        self.replicated = replicated
        self.parts = parts
        self.gradients_complete = False
        """every gradient of the step under way is what the job's ranks have summed: only the norm is missing"""
        self.last_norm = math.nan
        """the global norm that the last step was taken, or skipped, with"""
        parameters = self._parameters()
        # On the CPU the fused step is one pass instead of ten; on a GPU it would keep the count of steps there.
        self._fused = bool(parameters) and all(p.device.type == "cpu" for p in parameters)
        self._adamw = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=self._fused)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._adamw, schedule)

    @property
    def learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

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
        # A rank may own no expert; its zero must be on the device where the others' sums are.
        self.gradients_complete = True
        device = next((parameter.device for parameter in self._parameters()), torch.device("cpu"))
        total = _sum_of_squares(self.owned if counts_owned else {}, device)
        if self.parts and self.parts.groups.dp_rank == 0:
            total += _sum_of_squares(self.parts.parameters, device)
        dist.all_reduce(total, group=group)
        return math.sqrt((total + _sum_of_squares(self.replicated, device)).item())

    def step(self, grad_norm: float, max_grad_norm: float | None) -> bool:
        """Clip by the global norm and step. If that is not finite, let the step pass: parameters and moments stay, the schedule goes on.

        Parameters without a gradient (idle experts) are left untouched.

        Returns:
            Was a step taken?
        """
        taken = math.isfinite(grad_norm)
        if taken:
            self._clipped_step(grad_norm, max_grad_norm)
        self.last_norm = grad_norm
        self._adamw._opt_called = True  # type: ignore[attr-defined]  # a skipped step is no mistake in the order of calls
        self._scheduler.step()
        self.abandon()
        return taken

    def abandon(self) -> None:
        """Forget the gradients of the step under way."""
        self._adamw.zero_grad(set_to_none=True)
        self.gradients_complete = False

    def _clipped_step(self, grad_norm: float, max_grad_norm: float | None) -> None:
        if max_grad_norm is not None and grad_norm > max_grad_norm:
            scale = max_grad_norm / (grad_norm + 1e-6)
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self._adamw.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by stable names: `owned/NAME` and `replicated/NAME`, each with its moments.

        A parameter that was never stepped has no moments, here as in torch. Parts are put together, as `replicated/NAME`: a checkpoint
        knows nothing of them. Every rank must call it then, and the first of each tensor group gets them.
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

    def load_state_tensors(self, tensors: dict[str, Tensor], schedule_position: int) -> None:
        """Continue from `state_tensors`, `schedule_position` steps into the schedule."""
        with torch.no_grad():
            for kind, parameters in (("owned", self.owned), ("replicated", self.replicated)):
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[f"{kind}/{name}"])
                    stepped = f"{kind}/{name}/step" in tensors
                    self.set_moments(parameter, {key: tensors[f"{kind}/{name}/{key}"].clone() for key in MOMENTS} if stepped else {})
            for name, parameter in self.parts.parameters.items() if self.parts else ():
                self._load_part(name, parameter, tensors)
        self.set_position(schedule_position)

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

    def set_position(self, schedule_position: int) -> None:
        """Be so many steps into the schedule."""
        self._scheduler.last_epoch = schedule_position - 1
        self._adamw._opt_called = True  # type: ignore[attr-defined]  # LambdaLR warns about its order of calls otherwise
        self._scheduler.step()

    def row(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """All there is of an expert where it is owned or shadowed: `MASTER`, and the moments if it was ever stepped."""
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
        self._adamw.param_groups[0]["params"] = self._parameters()

    def replace_backups(self, backups: dict[str, nn.Parameter], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """`replace_owned` for backups."""
        self._replace(self.backups, backups, moments)
        self.backups = backups
        self._adamw.param_groups[0]["params"] = self._parameters()

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
        """Go on from `moments`, which may be none at all."""
        self._adamw.state.pop(parameter, None)
        if moments:
            # torch keeps the count of steps on the CPU.
            self._adamw.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}

    def _parameters(self) -> list[nn.Parameter]:
        parts = self.parts.parameters if self.parts else {}
        return [*self.owned.values(), *self.replicated.values(), *parts.values(), *self.backups.values()]


def _sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    if not parameters:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat, group=group)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter)


def _sum_of_squares(parameters: dict[str, nn.Parameter], device: torch.device) -> Tensor:
    """float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters.values():
        if parameter.grad is not None:
            total += parameter.grad.square().sum(dtype=torch.float64)
    return total
