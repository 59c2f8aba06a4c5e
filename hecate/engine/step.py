"""One optimizer step of an FSSDP engine, while it lasts.

    step = engine.begin_step(number, micro_steps)   plan every layer (a pure function of values that all ranks share; no message), or take
                                                    the plans that were made during the last step's last backward pass
    micro = step.begin_micro_step(tokens)           where its loads are known (`plan` replay), exchange them and plan every layer from them
    micro.prefetch(*units)                          start the SparseAllGather of layers, before the attention that hides it
    micro.experts(unit, ...)                        wait for the replicas; dispatch what must travel; compute; combine
    micro.backward(loss)                            start the gathers that the backward pass needs first; run it; in the step's last one
                                                    each layer's SparseReduceScatter starts as soon as its gradient is complete, and of
                                                    the layer before it the sum over the sharding groups, if there are several; so does
                                                    a pool's, after the last of the layers that draw on it
    loads = step.finish()                           wait for the reductions; exchange and record the loads; hand gradients to the
                                                    owners' parameters

Parameters do not change between the micro-steps of one step, so the replicas live across them and gradients are reduced once. Not so
where replicas are freed between forward and backward (`rematerialize`), or where plans follow each micro-step's own loads (`plan`): there
each micro-step gathers and reduces for itself, and the owners add up.

Whatever is called out of this order is refused (`OrderError`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate import faults
from hecate.engine.shards import ExpertShards
from hecate.errors import UserError
from hecate.experts.forward_pass import CurrentPass, OrderError, PassTokens
from hecate.experts.pass_routing import expert_counts
from hecate.experts.routers.router import RouterStats, Routing
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.comm.aborts import read
from hecate.parallel.comm.device_tables import copy_to
from hecate.parallel.comm.exchanges import all_gather_single
from hecate.parallel.comm.host_read import HostRead
from hecate.parallel.transfer.transfer_plan import plan_change
from hecate.parallel.values.units import Unit


class StepLedger:
    """What every training step keeps, whoever computes its experts: its number, the order of its micro-steps, its loads."""

    def __init__(self, shards: ExpertShards, number: int, micro_steps: int) -> None:
        if micro_steps < 1:
            raise OrderError(f"step {number} was begun with {micro_steps} micro-steps; a step has at least one")
        self.number = number
        """The number of the optimizer step, from 0."""
        self.micro_steps = micro_steps
        self.finished = False
        self._shards = shards
        self._next = 0
        """The number of the micro-step that begins next."""
        self._loads_RN: HostRead | None = None
        """The loads of all units' experts by rank, int64 [ranks, N], on their way to the host; None: they are not sent yet."""
        self._loads: dict[Unit, np.ndarray] | None = None
        self._reading = threading.Lock()
        self._under_way: int | None = None
        """The number of the micro-step under way, from 0; None: none is under way."""
        self._counts = {
            unit: torch.zeros(family.num_experts, dtype=torch.int64, device=shards.device) for unit, family in shards.families.items()
        }

    @property
    def in_last_micro_step(self) -> bool:
        return self._under_way == self.micro_steps - 1

    def begin_micro_step(self) -> int:
        """The number of the next micro-step, from 0, which is under way from now on."""
        if self.finished:
            raise OrderError(f"step {self.number} is finished; a micro-step belongs to a step that engine.begin_step has just returned")
        if self._under_way is not None:
            raise OrderError(f"micro-step {self._under_way} of step {self.number} has had no backward pass; call its backward(loss) first")
        if self._next == self.micro_steps:
            raise OrderError(f"step {self.number} was begun with {self.micro_steps} micro-steps, and all have run; finish the step")
        self._under_way, self._next = self._next, self._next + 1
        return self._under_way

    def require(self, micro_step: int) -> None:
        """Raises OrderError: another micro-step is under way, or none."""
        if self._under_way != micro_step:
            raise OrderError(f"micro-step {micro_step} of step {self.number} is over; its experts cannot be called any more")

    def end_micro_step(self) -> None:
        self._under_way = None

    def add(self, unit: Unit, count_E: Tensor) -> None:
        """Add how many of this rank's tokens have chosen each expert, int64 [experts]."""
        self._counts[unit] += count_E

    def require_complete(self) -> None:
        """Raises OrderError: not every micro-step has run forward and backward."""
        if self.finished:
            raise OrderError(f"step {self.number} is finished already")
        if self._under_way is not None or self._next < self.micro_steps:
            done = self._next - (self._under_way is not None)
            raise OrderError(f"step {self.number} cannot finish: {done} of its {self.micro_steps} micro-steps have had their backward pass")

    def close(self, gradients: Mapping[Unit, Tensor], loads: dict[Unit, np.ndarray]) -> None:
        """Hand gradients to the owners' parameters and record the loads. Every rank must call it.

        An expert that no token of any rank reached gets no gradient (None), so that its optimizer leaves it untouched.

        Args:
            gradients: [owned experts, C] of each of `ExpertShards.trained`, summed over all ranks.
            loads: of `exchange_loads`.
        """
        shards = self._shards
        reached = shards.reached(loads)
        for unit, store in shards.trained.items():
            for expert, parameter, grad in zip(store.experts, store.parameters, gradients[unit], strict=True):
                parameter.grad = grad if reached[unit][expert] else None
        shards.history.record(loads)
        self.finished = True
        if shards.mesh.num_sharding_groups > 1 and loads:
            # Groups plan apart, so only the group of the job's busiest rank knows what that rank has served.
            most = shards.plans.most_served(loads)
            most_L = copy_to(torch.tensor(list(most.values()), dtype=torch.float64), shards.device)
            dist.all_reduce(most_L, op=dist.ReduceOp.MAX, group=shards.groups.world)
            shards.plans.note_most_served(dict(zip(most, read(most_L, shards.groups.world).tolist(), strict=True)))

    def start_exchange(self) -> None:
        """Send all ranks the step's loads, which are complete after the forward pass of its last micro-step, and begin to plan the next
        step from them. Every rank must call it.

        The backward pass hides both: on a GPU, the host reads the loads while the device is still busy with that pass. A second call does
        nothing.
        """
        if self._counts and self._loads_RN is None:
            self._loads_RN = exchange_counts(torch.cat(list(self._counts.values())), self._shards.groups.world)
            self._shards.plans.begin_ahead(self._loads_in_thread)

    def exchange_loads(self) -> dict[Unit, np.ndarray]:
        """Per layer the step's loads, int64 [experts, ranks of the job]. Every rank must call it."""
        self.start_exchange()
        return self._exchanged(self._loads_RN) if self._loads_RN is not None else {}

    def _loads_in_thread(self) -> dict[Unit, np.ndarray]:
        if self._shards.device.type == "cuda":
            torch.cuda.set_device(self._shards.device)  # a thread begins with the first device, on which its wait would make a context
        assert self._loads_RN is not None
        return self._exchanged(self._loads_RN)

    def _exchanged(self, loads_RN: HostRead) -> dict[Unit, np.ndarray]:
        """The loads that were sent: one object, whichever thread asks first, since a step is known by it (`MeasuredModes.choose`)."""
        with self._reading:
            if self._loads is None:
                cuts = np.cumsum([len(count) for count in self._counts.values()])[:-1]
                self._loads = dict(zip(self._counts, np.split(by_rank(loads_RN), cuts), strict=True))
            return self._loads


def exchange_counts(count: Tensor, group: dist.ProcessGroup) -> HostRead:
    """int64 [ranks, n]: every rank's counts [n], on the way to the host. Every rank of the group must call it."""
    table_RN = count.new_empty((dist.get_world_size(group), len(count)))
    all_gather_single(table_RN.view(-1), count, group=group)
    return HostRead(table_RN, group)


def by_rank(counts: HostRead) -> np.ndarray:
    """int64 [n, ranks]: what `exchange_counts` has sent."""
    return np.ascontiguousarray(counts.get().numpy().T)


def require_nothing_under_way(last: StepLedger | None, current: CurrentPass) -> None:
    """Raises OrderError: a step is not finished, or an evaluation has not ended.

    Args:
        last: of the step that began last; None: none has begun.
    """
    if last is not None and not last.finished:
        raise OrderError(
            f"step {last.number} is not finished; neither another step nor an evaluation can begin before step.finish()\n"
            "  after a step that failed, let the engine rejoin its ranks first"
        )
    if current.now is not None:
        raise OrderError("an evaluation is under way; neither a step nor another evaluation can begin before its block ends")


class Step:
    """One optimizer step, from its plans to its gradients."""

    def __init__(self, shards: ExpertShards, current: CurrentPass, number: int, micro_steps: int) -> None:
        """Plans all layers from the history. Every rank must make one. `micro_steps`: in which the step's tokens come."""
        self.ledger = StepLedger(shards, number, micro_steps)
        self.peak_replica_bytes = shards.replica_bytes
        """The most bytes of replicas that this rank had or waited for at once since the step began."""
        self.shards, self._current = shards, current
        self._under_way: MicroStep | None = None
        """The micro-step whose backward pass is under way."""
        self._reduced_last: Unit | None = None
        """The layer or pool whose reduction was started last in the step's last backward pass."""
        self._clips = False
        """Whether the micro-step under way has a limit for its gradients."""
        self._clipped: dict[Unit, Tensor] = {}
        """The sums of the clipped gradients of the micro-steps so far, [slots, C] for each of `ExpertShards.trained`."""
        shards.plans.begin(number, micro_steps)

    def begin_micro_step(self, tokens: PassTokens | None = None) -> MicroStep:
        """The model's next forward pass is of these tokens; None: of any, without padding.

        Raises:
            OrderError: plans are made from loads that are known ahead, and the tokens bring no routing; or as `StepLedger`.
        """
        micro = MicroStep(self, self.ledger.begin_micro_step(), tokens or PassTokens())
        if self.shards.config.plan == "replay":
            self._plan_ahead(micro.tokens)
        self._current.now = micro
        return micro

    def finish(self) -> dict[Unit, np.ndarray]:
        """See `TrainingStep.finish`."""
        self.ledger.require_complete()
        trained = self.shards.trained
        for unit, store in reversed(trained.items()):
            if not store.reduce_started:
                raise OrderError(f"step {self.ledger.number} cannot finish: layer {unit} took no part in its last backward pass")
            # Latest layers first, as their reductions were started: every rank starts the sums over groups in this order.
            store.sum_over_groups()
        # All waits come before `close`. One that fails because a rank is lost leaves parameters without gradients and the history as it
        # was, so that the step can be done again.
        loads = self.ledger.exchange_loads()
        gradients = {unit: store.reduced() for unit, store in trained.items()}
        self.ledger.close(gradients, loads)
        return loads

    def prefetch(self, *units: Unit) -> None:
        """See `ForwardPass.prefetch`. Does nothing where plans must wait for the router."""
        mode = self.shards.plans.mode
        if early := [unit for unit in units if mode(unit) != "exact"]:
            self._gather(*early)

    def replicas(self, micro: MicroStep, unit: Unit, expert_TK: Tensor) -> Tensor:
        """Wait for the replicas with which a layer computes, [slots, C], after planning it anew where plans follow the router."""
        shards = self.shards
        self.ledger.require(micro.number)
        # A checkpointed layer that runs again in the backward pass computes with the placement of its first run, and counts nothing twice.
        if micro.counts:
            count_E = expert_counts(expert_TK, shards.families[unit].num_experts)
            self.ledger.add(unit, count_E)
            if shards.plans.mode(unit) in ("exact", "calibrated"):
                self._plan_after_router(unit, count_E)
        self._gather(unit)
        return self._wait_for_replicas(unit)

    def backward(self, micro: MicroStep, loss: Tensor, gradient: Tensor | None, limit: Tensor | None) -> None:
        """See `MicroStep.backward`."""
        self.ledger.require(micro.number)
        self._clips = limit is not None
        if self._clips:
            self._require_own_tokens()
        if self.ledger.in_last_micro_step:
            self.ledger.start_exchange()
        self._under_way = micro
        # The backward pass begins with the last layers, whose freed replicas would otherwise be gathered only when it needs them.
        self._prefetch_backward()
        torch.autograd.backward(loss, gradient)
        self._under_way = None
        if limit is not None:
            self._add_clipped(limit)
        self._end_pass(micro)

    def _end_pass(self, micro: MicroStep) -> None:
        self.ledger.end_micro_step()
        self._current.now = None

    def _require_own_tokens(self) -> None:
        """Raises UserError: a rank's replicas collect gradients of other ranks' tokens, too, or each micro-step reduces its own."""
        shards = self.shards
        if shards.config.per_micro_step or any(shards.plans.transfer(unit).tokens is not None for unit in shards.families):
            raise UserError(
                "gradients cannot be clipped by samples where tokens leave their rank, or where each micro-step reduces its own\n"
                "  set fssdp.policy=full, and leave fssdp.plan and fssdp.rematerialize out"
            )

    def _add_clipped(self, limit: Tensor) -> None:
        """Clip the gradients of this backward pass, add them to those of the step's earlier ones, and reduce the sums after the last."""
        trained = self.shards.trained
        found = {unit: store.take_gradient() for unit, store in trained.items()}
        square = torch.stack([grad_SC.square().sum(dtype=torch.float64) for grad_SC in found.values()]).sum()
        factor = (limit / square.sqrt()).clamp(max=1.0)
        for unit, grad_SC in found.items():
            # Slots of other sources have no gradient, and keep none if this one's is not finite: 0 * NaN is NaN.
            grad_SC.copy_(torch.where(grad_SC == 0, grad_SC, grad_SC * factor.to(grad_SC.dtype)))
            self._clipped[unit] = self._clipped[unit].add_(grad_SC) if unit in self._clipped else grad_SC
        if self.ledger.in_last_micro_step:
            for unit, store in reversed(trained.items()):
                store.reduce(self._clipped.pop(unit))

    def _plan_ahead(self, tokens: PassTokens) -> None:
        """Plan all layers of a micro-step from the routing that its tokens bring, on all ranks of the sharding group."""
        shards = self.shards
        if tokens.routing is None:
            raise OrderError(
                "fssdp.plan=replay plans each micro-step from the routing of its tokens, but they bring none\n"
                "  begin the micro-step with `PassTokens(routing=...)`"
            )
        count = [expert_counts(tokens.routing.experts(unit), family.num_experts) for unit, family in shards.families.items()]
        # Through the tokens' group: reductions of the micro-step before may be under way in the other one.
        loads_ND = by_rank(exchange_counts(torch.cat(count), shards.groups.tokens))
        cuts = np.cumsum([len(count_E) for count_E in count])[:-1]
        shards.plans.ahead(dict(zip(shards.families, np.split(loads_ND, cuts), strict=True)))

    def _plan_after_router(self, unit: Unit, count_E: Tensor) -> None:
        """Plan a layer's micro-step from what all ranks have chosen."""
        shards = self.shards
        # Through the tokens' group: the layer's own gather may be under way in the other one.
        loads_ED = by_rank(exchange_counts(count_E, shards.groups.tokens))
        plan = shards.plans.after_router(unit, loads_ED)
        if plan is not None:
            calibrated = shards.plans.mode(unit) == "calibrated"
            if calibrated:
                # `exchange` starts from a gather by the plan of before. Without prefetching none has been started.
                self._gather(unit)
                before = shards.plans.transfer(unit)
            transfer = shards.plans.place(unit, plan)
            if calibrated:
                # During the exchange this rank has the replicas of both plans.
                self._note_peak(transfer.chunks.replica_bytes)
                shards.stores[unit].exchange(transfer, plan_change(before.chunks, transfer.chunks))
        shards.plans.note_served(unit, loads_ED)

    def _gather(self, *units: Unit) -> None:
        stores = [self.shards.stores[unit] for unit in units]
        before = sum(store.replica_bytes for store in stores)
        self.shards.gather(*units)
        # Only if something was gathered: with hundreds of units (linears), a sum over all of them at each would take longer than experts.
        if sum(store.replica_bytes for store in stores) > before:
            self._note_peak()

    def _note_peak(self, more: int = 0) -> None:
        self.peak_replica_bytes = max(self.peak_replica_bytes, self.shards.replica_bytes + more)

    def _wait_for_replicas(self, unit: Unit) -> Tensor:
        source = self.shards.trained_in[unit]
        return self.shards.stores[source].replicas(lambda: self._gradient_complete(source))

    def computed(self, micro: MicroStep, unit: Unit, y_RD: Tensor) -> None:
        """A layer's experts have computed. With `rematerialize`, give the replicas' memory back until the backward pass."""
        if micro.counts and self.shards.config.rematerialize and y_RD.requires_grad:
            # The hook runs before the backward of the experts, which read the replicas through views that autograd has saved.
            y_RD.register_hook(lambda _: self._gather_again(unit))
            self.shards.stores[unit].free()
            micro.awaiting_backward.append(unit)

    def _gather_again(self, unit: Unit) -> None:
        """The backward pass has come to a layer whose replicas were freed; a checkpointed layer may have gathered them itself."""
        self._gather(unit)
        self._wait_for_replicas(unit)

    def _prefetch_backward(self) -> None:
        count = self.shards.config.prefetch
        if count and self._under_way is not None:
            # All units of a decoder layer at once, which share a message; the last layers first, as the backward pass reaches them.
            awaiting = self._under_way.awaiting_backward
            coming = list(dict.fromkeys(unit.layer for unit in reversed(awaiting)))[:count]
            self._gather(*(unit for unit in reversed(awaiting) if unit.layer in coming))

    def _gradient_complete(self, unit: Unit) -> None:
        """The backward pass is through with a layer's experts, or with all that draw on a pool."""
        faults.at("backward")
        shards, in_last = self.shards, self.ledger.in_last_micro_step
        # The clipping factor needs the norm over all layers, so nothing is reduced before the backward pass is over (`_add_clipped`).
        if self._clips or not self._leaves_replicas(unit):
            return
        assert self._under_way is not None
        if shards.config.rematerialize:
            # The gather of the next layers is started before this layer's reduction, which would otherwise delay it in the same group:
            # replicas are needed at once, gradients at the step's end. Memory is to hold the gradients of one layer's replicas at a time.
            shards.stores[unit].free()
            self._under_way.awaiting_backward.remove(unit)
            self._prefetch_backward()
            for store in shards.stores.values():
                store.wait_for_reduction()
        if not self._reduce(unit):
            return
        if in_last:
            # The reduction before this one has had a layer's backward pass to arrive in; the sum over the groups has the rest of the step.
            # Waiting for the reduction frees the replicas' gradients and its buffers: only the owners' sums are left.
            if self._reduced_last is not None:
                shards.stores[self._reduced_last].sum_over_groups()
            self._reduced_last = unit
        if shards.plans.mode(unit) == "calibrated":
            # Prefetches of the next micro-step gather by the plan of past loads, which its router may then change.
            shards.plans.place_from_history(unit)

    def _leaves_replicas(self, unit: Unit) -> bool:
        """Whether this backward pass's gradients leave the replicas now, for their owners."""
        return self.ledger.in_last_micro_step or self.shards.plans.gathers_for_itself(unit)

    def _reduce(self, unit: Unit) -> bool:
        """Take a layer's gradients from the replicas; whether their sum is on its way to the owners."""
        self.shards.stores[unit].reduce()
        return True


@dataclass(frozen=True, eq=False)
class MicroStep:
    """A forward pass of a step, for its backward pass: a `ForwardPass`."""

    owner: Step
    number: int
    """The number of the micro-step in its step, from 0."""
    tokens: PassTokens
    counts: bool = True
    """Whether what the pass does counts; False: a checkpointed layer runs again, and was counted the first time."""
    stats: dict[Unit, RouterStats] = field(default_factory=dict)
    """What the routers of the layers that have run have done."""
    awaiting_backward: list[Unit] = field(default_factory=list)
    """The units whose replicas were freed after their forward pass, in the order of these passes."""

    @property
    def step(self) -> int:
        return self.owner.ledger.number

    def prefetch(self, *units: Unit) -> None:
        self.owner.prefetch(*units)

    def note_routing(self, unit: Unit, routing: Routing) -> None:
        if self.counts:
            self.stats[unit] = routing.stats()

    def experts(self, unit: Unit, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor) -> Tensor:
        shards, replicas_SC = self.owner.shards, self.owner.replicas(self, unit, expert_TK)
        faults.at("experts", x_TD)
        work = shards.dispatched(unit, replicas_SC, RoutedTokens(x_TD, expert_TK, weight_TK, token_T))
        y_RD = shards.families[unit].compute(work.routed, work.replicas, self.step)
        self.owner.computed(self, unit, y_RD)
        return shards.combined(work, y_RD, backward_follows=self.counts and torch.is_grad_enabled())

    def again(self) -> MicroStep:
        return replace(self, counts=False)

    def backward(self, loss: Tensor, gradient: Tensor | None = None, limit: Tensor | None = None) -> None:
        """See `TrainingPass.backward`.

        Raises:
            UserError: there is a limit, but the engine's settings leave other tokens' gradients on a rank, too.
        """
        self.owner.backward(self, loss, gradient, limit)
