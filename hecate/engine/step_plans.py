"""What each layer does in a step: planned from past loads or from the step's own, and what has come of it.

Nothing here sends a message or touches a tensor: all ranks of a sharding group hold the same values and come to the same plans.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hecate.engine.plans_ahead import Answers, PlansAhead
from hecate.experts.family import ExpertFamily, OwnedChunks
from hecate.parallel.cluster.mesh import Mesh, hiding_flops, owners_topology
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import ExecutionMode, LayerCost, PlanChoice, PlanMode
from hecate.parallel.loops import jit
from hecate.parallel.plan.after_router import best_after_router, one_layer
from hecate.parallel.plan.measured_modes import MeasuredModes, modes_of
from hecate.parallel.planners import POLICIES, LayerPlan, Plan, PlanInput, Planner, plan_with
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.transfer.residency import FrozenMove, Residency, expected_uses, frozen_move
from hecate.parallel.transfer.transfer_plan import TransferPlan, plan_transfer
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.loads import LoadHistory, imbalance
from hecate.parallel.values.optimizer_state import State, expert_spec, owner_bytes
from hecate.parallel.values.placement import Placement, everything_everywhere, owners_only
from hecate.parallel.values.units import Unit


class PlannerError(Exception):
    """A planner returned a plan that cannot be carried out: a mistake in the planner, not of whoever trains with it."""


SlotsByMemory = Callable[[Topology], np.ndarray | None]


@dataclass(frozen=True)
class EngineConfig:
    """What the engine plans with."""

    planner: Planner
    topology: Topology
    """The devices and links of all ranks of the job."""
    load_window: int = 5
    memory_slots: int | None = None
    """The number of free replica slots per device and layer; None: as many as `slots_by_memory` says, or as there are experts."""
    slots_by_memory: SlotsByMemory | None = None
    """Returns for how many slots each rank's device has room, int64 [ranks of the job], the same on every rank. If it is None, or returns
    None, memory is ample or not known."""
    max_imbalance: float | None = None
    """The planner's limit for the imbalance of a layer: see `PlanInput.max_imbalance`."""
    state: State | None = None
    """What the optimizer keeps of an expert; None: AdamW's two moments, as `ExpertFamily.cost` has it."""
    top_k: int = 1
    non_moe_flops: float = 0.0
    """The forward FLOPs per rank and micro-step of what hides a layer's gather (its attention)."""
    plan: PlanChoice = "history"
    """The loads from which layers are planned: see `PlanChoice`."""
    rematerialize: bool = False
    """Whether a layer's replicas are freed after its forward pass and gathered again before its backward pass (Hecate-RM)."""
    prefetch: int = 1
    """The number of decoder layers by which a gather starts early in the forward pass (1: when its own decoder layer begins), and, with
    `rematerialize`, of layers that are gathered ahead in the backward pass."""
    on_every_rank: bool = False
    """Whether every rank has all experts and no token leaves its rank, so that results depend neither on ranks nor on placements."""
    tp_size: int = 1
    """The number of ranks in a tensor group, which are lost together."""
    max_steps: int | None = None
    """The steps of the run, for which frozen parts are brought; None: not known."""

    def execution(self, plan: PlanMode, micro_steps: int = 1) -> ExecutionMode:
        """How a layer's plans are executed in a step of so many micro-steps."""
        return ExecutionMode(plan=plan, rematerialize=self.rematerialize, prefetch=self.prefetch, micro_steps=micro_steps)

    @property
    def per_micro_step(self) -> bool:
        """Whether layers may gather and reduce in each micro-step for themselves."""
        return self.rematerialize or self.plan != "history"

    @property
    def modes(self) -> tuple[PlanMode, ...]:
        """Among which each layer's is chosen, the first to begin with."""
        return modes_of(self.plan, self.prefetch)


@dataclass(eq=False)
class UnitPlan:
    """What is planned of one layer's experts, or of one pool, from step to step and in the step that began last."""

    owner_E: np.ndarray
    """The owner of each expert, int64 [experts]."""
    chunk: ChunkSize
    """The size of one expert's master chunk."""
    residency: Residency | None = None
    """Which ranks hold which frozen parts, or are about to receive them; None: the experts have no frozen parts."""
    frozen_for: Placement | None = None
    """The placement for which frozen parts were fetched last; None: the parts that are held may be others."""
    last_planned: Placement | None = None
    """The placement that the planner chose last, for planners that change their last plan."""
    mode: PlanMode | None = None
    """The loads from which the layer is planned; None: all layers are planned alike."""
    given: tuple[PlanInput, int] | None = None
    """What the step's plan was made from, and the layer's index in that."""
    from_history: LayerPlan | None = None
    """The step's first plan, which was made from past loads."""
    plan: LayerPlan | None = None
    """The plan by which the layer goes now."""
    transfer: TransferPlan | None = None
    """How the plan is carried out on this rank; None: nothing was planned since the owners changed."""
    served_D: np.ndarray | None = None
    """The assignments that each rank has served so far in this step, float64 [ranks], where plans follow the true loads."""
    most_served: float = 0.0
    """The assignments that the busiest rank of the job has served in the last step, if there are several sharding groups."""


class StepPlans:
    """The plans of all MoE layers, on one rank of a sharding group.

    Ranks, owners and placements are those of the group, which plans for its own loads on its own devices. Recorded loads, int64 [experts,
    ranks], are those of the whole job.

    Args:
        owners: int64 [experts] of each layer.
        history: of the job's loads.
        group: which of the mesh's sharding groups this is.
        rank: in the group.
        pools: whose blocks are on every rank, whatever is planned.
    """

    def __init__(
        self,
        families: Mapping[Unit, ExpertFamily],
        config: EngineConfig,
        owners: dict[Unit, np.ndarray],
        history: LoadHistory,
        mesh: Mesh,
        group: int,
        rank: int,
        pools: Mapping[Unit, OwnedChunks] | None = None,
    ) -> None:
        self._families, self.mesh, self._rank = families, mesh, rank
        self._pools = pools or {}
        self.members = mesh.sharding_groups()[group]
        """The ranks of the sharding group, by their numbers in the job."""
        self.config = config
        self.history = history
        self.units = {
            unit: UnitPlan(owners[unit], ChunkSize(owned.layout().trainable_numel, owned.replica_dtype.itemsize))
            for unit, owned in (*families.items(), *self._pools.items())
        }
        """The plan of each layer and each pool."""
        for unit, family in families.items():
            if family.layout().frozen:
                self.units[unit].residency = Residency.of_owners(owners[unit], self.slots(family))
        self.calibrations = 0
        """The number of plans of this step's micro-steps and layers that gave way to better ones after the router."""
        self._measured: dict[tuple[Unit, ...], MeasuredModes] = {}
        """What choosing their modes has measured, for each tuple of layers of one shape; never changed, but replaced."""
        self._ahead: PlansAhead | None = None
        """What is planned of the next step while this one runs; None: nothing is."""
        self.made_ahead = self.waited_ahead = self.made_anew = 0
        """The steps whose plans were all made ahead, and of these the ones that had to wait for them; and those for which some were made
        when the step began, because there were none or they were of other values."""
        self._number = 0
        """The number of the step that began last."""
        self._micro_steps = 1
        """The number of micro-steps of the step that began last."""

    @property
    def config(self) -> EngineConfig:
        return self._config

    @config.setter
    def config(self, config: EngineConfig) -> None:
        assert config.topology.world_size == self.mesh.world_size, (config.topology.world_size, self.mesh.world_size)
        self._config = config
        self.topology = config.topology.take(self.members) if self.mesh.num_sharding_groups > 1 else config.topology
        """The devices and links of the sharding group's ranks."""
        slots_W = None if config.slots_by_memory is None else config.slots_by_memory(config.topology)
        self._room_D = None if slots_W is None else slots_W.reshape(self.mesh.num_sharding_groups, self.mesh.shard_size).min(0)
        """The slots for which the devices of all groups have room, int64 [ranks of a group]; None: memory is ample or not known."""

    def slots(self, family: ExpertFamily) -> np.ndarray:
        """int64 [ranks]: free replica slots of each device in a layer, the same in all sharding groups."""
        if self.config.memory_slots is not None:
            return np.full(self.mesh.shard_size, self.config.memory_slots)
        return np.full(self.mesh.shard_size, family.num_experts) if self._room_D is None else np.minimum(self._room_D, family.num_experts)

    def mode(self, unit: Unit) -> PlanMode:
        """From which loads a layer is planned in the step that began last."""
        return self.units[unit].mode or self.config.modes[0]

    @property
    def chosen_modes(self) -> dict[Unit, PlanMode]:
        """The mode of each layer in the step that began last, where they are chosen layer by layer; else nothing."""
        return {unit: unit_plan.mode for unit, unit_plan in self.units.items() if unit_plan.mode is not None}

    @property
    def owners(self) -> dict[Unit, np.ndarray]:
        """int64 [experts] of each layer and pool."""
        return {unit: unit_plan.owner_E for unit, unit_plan in self.units.items()}

    @property
    def residency(self) -> dict[Unit, Residency]:
        """Who holds which frozen parts, of the layers that have any."""
        return {unit: unit_plan.residency for unit, unit_plan in self.units.items() if unit_plan.residency is not None}

    @property
    def transfers(self) -> dict[Unit, TransferPlan]:
        """How the plan of each layer and pool is carried out on this rank."""
        return {unit: unit_plan.transfer for unit, unit_plan in self.units.items() if unit_plan.transfer is not None}

    def transfer(self, unit: Unit) -> TransferPlan:
        """How the plan of one layer or pool is carried out on this rank."""
        transfer = self.units[unit].transfer
        assert transfer is not None, f"{unit} was not planned since its owners changed"
        return transfer

    def gathers_for_itself(self, unit: Unit) -> bool:
        """Whether each micro-step gathers and reduces a layer, or a pool, for itself."""
        return self.config.execution(self.mode(unit)).per_micro_step

    def begin(self, number: int, micro_steps: int) -> None:
        """Plan all layers of an optimizer step from the history, or prepare for plans from the loads of its micro-steps.

        Args:
            number: of the step in the run, from 0.
            micro_steps: in which the step's tokens come.
        """
        self._number = number
        self.calibrations = 0
        ahead, self._ahead = self._ahead, None
        waits = ahead is not None and not ahead.is_ready
        answers = Answers() if ahead is None else ahead.wait()
        for units, given, plan in self._from_history(micro_steps, answers):
            if plan is not None:
                self._place_all(units, given, plan)
            for index, unit in enumerate(units):
                unit_plan = self.units[unit]
                unit_plan.served_D = None
                unit_plan.given = given, index
                if plan is not None:
                    unit_plan.from_history = unit_plan.plan
        self._place_pools()
        is_ahead = ahead is not None and answers.made == 0
        self.made_ahead += is_ahead
        self.waited_ahead += is_ahead and waits
        self.made_anew += answers.made > 0

    def begin_ahead(self, loads: Callable[[], dict[Unit, np.ndarray]]) -> None:
        """Begin to plan the next step from what is known now and the loads of the step under way, after its last forward pass.

        `begin` takes what was made of the values that it would plan from itself. While planners may have to wait for machine code, it
        plans itself, because such waits count in no part of a step (`hecate.train.steps.step_clock`).

        Args:
            loads: returns the loads that the history will record, once they are there; another thread calls it.
        """
        if jit.state() not in ("ready", "plain") or all(self.config.execution(mode).knows_loads for mode in self.config.modes):
            return
        # A copy, of which the thread may change what it likes. All else that it reads never changes: sizes of experts, arrays, plans.
        of_next = copy.copy(self)
        of_next.units = {unit: replace(unit_plan) for unit, unit_plan in self.units.items()}
        of_next.history, of_next._measured = self.history.copy(), dict(self._measured)
        of_next._number = self._number + 1

        def make(answers: Answers) -> None:
            of_next.history.record(loads())
            of_next._from_history(of_next._micro_steps, answers)

        self._ahead = PlansAhead(make)

    def _from_history(self, micro_steps: int, answers: Answers) -> list[tuple[list[Unit], PlanInput, Plan | None]]:
        """The plans of an optimizer step from the history, and what they are made from, for each group of layers of one shape and mode;
        without a plan, if the step's own loads are to be known first."""
        self._micro_steps = micro_steps
        for unit_plan in self.units.values():
            if unit_plan.residency is not None:
                # Once a step: its counts say for how many steps a replica is used, by which planners divide what fetching one costs.
                unit_plan.residency = unit_plan.residency.after_step()
        if len(self.config.modes) > 1:
            self._choose_modes(answers)
        made: list[tuple[list[Unit], PlanInput, Plan | None]] = []
        for units, given in self.inputs():
            if given.execution.per_micro_step and given.loads_LED is not None:
                given = replace(given, loads_LED=given.loads_LED / micro_steps)  # a plan serves one of them
            plan = None
            if not given.execution.knows_loads:
                plan = answers.ask((self.config.planner, given, tuple(units)), partial(self._planned, given, units))
            made.append((units, given, plan))
        return made

    def ahead(self, loads: Mapping[Unit, np.ndarray]) -> None:
        """Plan all layers of a micro-step, which will go by these plans, from its loads, int64 [experts, ranks of the group]."""
        for units, given in self.inputs():
            given = replace(given, loads_LED=np.stack([loads[unit] for unit in units]).astype(np.float64))
            self._place_all(units, given, self._planned(given, units))
            for unit in units:
                self.note_served(unit, loads[unit])

    def inputs(self, *, for_owners: bool = False) -> list[tuple[list[Unit], PlanInput]]:
        """What a planner is given for the next step, for each group of layers of one shape and mode; and which layers these are.

        Args:
            for_owners: owners are decided by it, so it is the same in every sharding group: the mean of all groups' loads on
                `owners_topology`, without the replicas of frozen parts, which differ between groups.
        """
        inputs = []
        common = for_owners and self.mesh.num_sharding_groups > 1
        # Chosen modes may differ between sharding groups, whose owners must not.
        mode = (lambda _: "history" if "history" in self.config.modes else self.config.modes[0]) if for_owners else self.mode
        for units in self._alike(mode):
            family, plans = self._families[units[0]], [self.units[unit] for unit in units]
            held = [unit_plan.residency for unit_plan in plans if unit_plan.residency is not None]
            placed = [unit_plan.last_planned for unit_plan in plans if unit_plan.last_planned is not None]
            predicted_LEW = self.history.predict(units, lasting=bool(held))
            knows_resident, knows_present = bool(held) and not common, len(placed) == len(units) and not common
            topology = owners_topology(self.config.topology, self.mesh) if common else self.topology
            hiding = hiding_flops(self.config.non_moe_flops, topology, self.config.topology)
            cost, execution = self._cost(family, hiding), self.config.execution(mode(units[0]), self._micro_steps)
            if knows_resident:
                left = None if self.config.max_steps is None else max(self.config.max_steps - self._number, 1)
                cost = replace(cost, frozen_lifetime=expected_uses(held, left) * (self._micro_steps if execution.per_micro_step else 1))
            given = PlanInput(
                np.stack([unit_plan.owner_E for unit_plan in plans]),
                None if predicted_LEW is None else self._loads_of_groups(predicted_LEW, common=common),
                topology,
                cost,
                self.slots(family),
                resident_LED=np.stack([residency.held_ED for residency in held]) if knows_resident else None,
                max_imbalance=self.config.max_imbalance,
                execution=execution,
                present_LED=np.stack([placement.where_ED for placement in placed]) if knows_present else None,
            )
            inputs.append((units, given))
        return inputs

    @property
    def placements(self) -> dict[Unit, Placement]:
        """Of each layer, as it is gathered next."""
        return {unit: transfer.placement for unit, transfer in self.transfers.items()}

    def place(self, unit: Unit, plan: LayerPlan) -> TransferPlan:
        """A layer goes by this plan from now on; returns how it is carried out."""
        split_ED = plan.split(self.topology, self._rank) if plan.dispatches(self.topology) else None
        unit_plan = self.units[unit]
        unit_plan.plan, unit_plan.transfer = plan, plan_transfer(plan.placement, split_ED, unit_plan.chunk, self.topology, self._rank)
        return unit_plan.transfer

    def place_for_evaluation(self, *, on_owners: bool) -> None:
        """Place every expert of every layer on its owner alone, or else on every rank."""
        place = owners_only if on_owners else everything_everywhere
        for unit in self._families:
            placement = place(self.units[unit].owner_E, self.mesh.shard_size)
            # Loads without a zero, so that the plan says where any token of any rank goes.
            self.place(unit, LayerPlan(placement, np.ones(placement.where_ED.shape), None))
        self._place_pools()

    def place_from_history(self, unit: Unit) -> None:
        """A layer goes by the step's first plan again."""
        plan = self.units[unit].from_history
        assert plan is not None, f"{unit} has no plan of past loads"
        self.place(unit, plan)

    def after_router(self, unit: Unit, loads_ED: np.ndarray) -> LayerPlan | None:
        """What a layer's micro-step should go by, now that its loads [experts, ranks] are known; None: by what it has."""
        unit_plan = self.units[unit]
        assert unit_plan.given is not None
        given = one_layer(*unit_plan.given, loads_ED, None if unit_plan.residency is None else unit_plan.residency.held_ED)
        planner = partial(self._planned, units=[unit])
        if self.mode(unit) == "exact":
            plan = planner(given).layer(given, 0)
            unit_plan.last_planned = plan.placement
            return plan
        assert unit_plan.plan is not None
        ((gain, plan),) = best_after_router(planner, given, [unit_plan.plan], splits=self.config.planner is plan_auto)
        self.calibrations += gain > 0
        return plan if gain > 0 else None

    def fetch_frozen(self, unit: Unit) -> FrozenMove | None:
        """What has to move so that ranks hold the frozen parts that a layer's placement needs, which count as held from now on; what has no
        slot beside them is given up. None: they were fetched for this placement already.
        """
        unit_plan, placement = self.units[unit], self.transfer(unit).placement
        if placement == unit_plan.frozen_for:
            return None
        unit_plan.frozen_for = placement
        return self._change_residency(unit_plan, _held(unit_plan).need(placement.where_ED))

    def borrow_frozen(self, unit: Unit) -> FrozenMove:
        """As `fetch_frozen`, but nothing is given up before `return_frozen`."""
        unit_plan = self.units[unit]
        unit_plan.frozen_for = self.transfer(unit).placement
        return self._change_residency(unit_plan, _held(unit_plan).hold_for_now(unit_plan.frozen_for.where_ED))

    def return_frozen(self, unit: Unit) -> FrozenMove:
        """Give up what `borrow_frozen` has fetched and what has no slot."""
        unit_plan = self.units[unit]
        unit_plan.frozen_for = None
        return self._change_residency(unit_plan, _held(unit_plan).evict())

    def note_served(self, unit: Unit, loads_ED: np.ndarray) -> None:
        """A micro-step with such loads goes by the plan that the layer has now."""
        unit_plan = self.units[unit]
        assert unit_plan.plan is not None
        served_D = unit_plan.plan.served(loads_ED, self.topology)
        unit_plan.served_D = served_D if unit_plan.served_D is None else unit_plan.served_D + served_D

    def change_owners(self, unit: Unit, owner_E: np.ndarray) -> FrozenMove | None:
        """Between two steps: int64 [experts]. Returns what moves of the layer's frozen parts; None: it has none."""
        unit_plan = self.units[unit]
        unit_plan.owner_E = owner_E
        # All three were made for the former owners: a gather by them would send chunks from ranks that no longer have them.
        unit_plan.transfer = unit_plan.last_planned = unit_plan.frozen_for = None
        return None if unit_plan.residency is None else self._change_residency(unit_plan, unit_plan.residency.change_owners(owner_E))

    def adopt_residency(self, unit: Unit, after: Residency) -> FrozenMove:
        """Between two steps: hold what another run of the same owners held. Returns what moves of the layer's frozen parts."""
        unit_plan = self.units[unit]
        unit_plan.frozen_for = None
        return self._change_residency(unit_plan, after)

    def most_served(self, loads: Mapping[Unit, np.ndarray]) -> dict[Unit, float]:
        """Per layer the assignments that the busiest rank of this group has computed of a step's loads."""
        return {unit: float(self._served(unit, loads_EW).max()) for unit, loads_EW in loads.items()}

    def note_most_served(self, most: dict[Unit, float]) -> None:
        """With several sharding groups: `most_served` of the busiest group in the last step."""
        for unit, served in most.items():
            self.units[unit].most_served = served

    def imbalance(self, loads: Mapping[Unit, np.ndarray]) -> float:
        """Largest over mean assignments computed per rank, averaged over the layers: what the last plans made of a step's loads.

        Where plans follow the true loads, or there are several sharding groups, it is what they made of the last step's own.
        """
        skews = []
        for unit, loads_EW in loads.items():
            if self.mesh.num_sharding_groups == 1:
                skews.append(imbalance(self._served(unit, loads_EW)))
            else:
                total = loads_EW.sum()
                skews.append(self.units[unit].most_served * loads_EW.shape[1] / total if total else 1.0)
        return float(np.mean(skews)) if skews else 1.0

    def _change_residency(self, unit_plan: UnitPlan, after: Residency) -> FrozenMove:
        before, unit_plan.residency = _held(unit_plan), after
        return frozen_move(before, after, self._rank)

    def _place_pools(self) -> None:
        for unit in self._pools:
            unit_plan = self.units[unit]
            everywhere = everything_everywhere(unit_plan.owner_E, self.mesh.shard_size)
            unit_plan.transfer = plan_transfer(everywhere, None, unit_plan.chunk, self.topology, self._rank)

    def _place_all(self, units: Sequence[Unit], given: PlanInput, plan: Plan) -> None:
        for index, unit in enumerate(units):
            of_layer = plan.layer(given, index)
            self.units[unit].last_planned = of_layer.placement
            self.place(unit, of_layer)

    def _planned(self, given: PlanInput, units: Sequence[Unit]) -> Plan:
        """Raises PlannerError: the plan has other owners than were given."""
        plan = plan_with(self.config.planner, given)
        if not np.array_equal(plan.owner_LE, given.owner_LE):
            raise PlannerError(_moved_owners(self.config.planner, units, given.owner_LE, plan.owner_LE))
        return plan

    def _choose_modes(self, answers: Answers) -> None:
        """Choose the mode of each layer for the step that begins, by the steps in the history."""
        modes: dict[Unit, PlanMode] = {}
        for unit_plan in self.units.values():
            # With the last step's modes, `inputs` would separate layers of one shape, of which each is to be free to choose any mode.
            unit_plan.mode = None
        for units, given in self.inputs():
            recent_SLEW = self.history.recent(units)
            if recent_SLEW is None:
                recent_SLEW = np.empty((0, len(units), given.num_experts, self.mesh.world_size), dtype=np.int64)
            steps, measured, among = tuple(self.history.snapshot()), self._measured.get(tuple(units)), self.config.modes
            question = (self.config.planner, given, tuple(units), steps, measured, among)
            chosen, self._measured[tuple(units)] = answers.ask(
                question, partial(self._chosen, units, given, steps, self._loads_of_groups(recent_SLEW), measured)
            )
            modes.update(zip(units, chosen, strict=True))
        for unit, mode in modes.items():
            self.units[unit].mode = mode

    def _chosen(
        self, units: Sequence[Unit], given: PlanInput, steps: Sequence[object], loads_SLED: np.ndarray, measured: MeasuredModes | None
    ) -> tuple[list[PlanMode], MeasuredModes]:
        """The modes that the measured ones choose, and what they have measured then; they stay as they are."""
        splits = self.config.planner is plan_auto
        after = copy.copy(measured) if measured else MeasuredModes(self.history.window, splits=splits, modes=self.config.modes)
        return after.choose(partial(self._planned, units=units), given, steps, loads_SLED), after

    def _alike(self, mode: Callable[[Unit], PlanMode]) -> list[list[Unit]]:
        """The layers in groups of one shape and mode."""
        alike: dict[tuple[int, object, PlanMode], list[Unit]] = {}
        for unit, family in self._families.items():
            key = (family.num_experts, self._cost(family, self.config.non_moe_flops), mode(unit))
            alike.setdefault(key, []).append(unit)
        return list(alike.values())

    def _cost(self, family: ExpertFamily, non_moe_flops: float) -> LayerCost:
        cost = family.cost(self.config.top_k, non_moe_flops)
        if self.config.state is not None:
            number_bytes = family.no_chunks().element_size()
            cost = replace(cost, state_bytes=owner_bytes(self.config.state, expert_spec(family.layout().trainable), number_bytes))
        return replace(cost, on_every_rank=True) if self.config.on_every_rank else cost

    def _served(self, unit: Unit, loads_EW: np.ndarray) -> np.ndarray:
        """float64 [ranks]: assignments that each rank of this group has computed of a step's loads."""
        unit_plan = self.units[unit]
        if unit_plan.served_D is not None:
            return unit_plan.served_D
        assert unit_plan.plan is not None
        return unit_plan.plan.served(self._loads_of_groups(loads_EW), self.topology)

    def _loads_of_groups(self, loads_EW: np.ndarray, *, common: bool = False) -> np.ndarray:
        """[..., experts, ranks]: of the job's loads those of this sharding group; `common`: the mean of all groups'."""
        if common:
            return np.asarray(loads_EW.reshape(*loads_EW.shape[:-1], self.mesh.num_sharding_groups, self.mesh.shard_size).mean(-2))
        return loads_EW[..., self.members]


def _moved_owners(planner: Planner, units: Sequence[Unit], before_LE: np.ndarray, after_LE: np.ndarray) -> str:
    name = next((name for name, policy in POLICIES.items() if policy is planner), getattr(planner, "__name__", type(planner).__name__))
    if before_LE.shape != after_LE.shape:
        return f"planner {name}: `Plan.owner_LE` has the shape {after_LE.shape}, but `PlanInput.owner_LE` has {before_LE.shape}"
    index, expert = (int(first) for first in np.argwhere(before_LE != after_LE)[0])
    return (
        f"planner {name}: its plan moves expert {expert} of layer {units[index]} from its owner, rank {before_LE[index, expert]}, "
        f"to rank {after_LE[index, expert]}\n"
        "  a plan keeps the owners that it is given (`Plan.owner_LE` equals `PlanInput.owner_LE`); only re-sharding changes owners"
    )


def _held(unit_plan: UnitPlan) -> Residency:
    """Of a layer whose experts have frozen parts."""
    assert unit_plan.residency is not None
    return unit_plan.residency
