"""Step times and bytes of a dry run by hand: one FLOP, one byte and one byte of memory per second, no latency."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hecate.apps.foresee.dry_run import Forecast, PolicyForecast, fits, forecast
from hecate.apps.foresee.plan import _policy_tables, run_plan
from hecate.errors import UserError
from hecate.model.sizes.memory import PHASES, memory_parts
from hecate.model.sizes.run_shape import run_shape, shape_on
from hecate.parallel.cluster.step_spread import step_spread
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cluster.topology_cards import SeenTopology
from hecate.parallel.cost.cost_loops import distinct
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.traces import Trace
from hecate.parallel.values.units import Unit
from testing.unit_cases import unit_topology
from tests.hecate.apps.foresee.making import config_for, slow_node, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, hidden 16, FFN 24, vocabulary 32; queries and outputs 16 to 16, keys and values 16 to 8; 4 experts of rank 2."""
    path = tmp_path_factory.mktemp("dry-run")
    write_model(path)
    return path


def dry_run(folder: Path, *overrides: str, topology: Topology | None = None) -> Forecast:
    run = run_shape(config_for(folder, *overrides), None, 2)
    return forecast(replace(run, topology=topology or slow_node()), "balanced")


def of(found: Forecast, policy: str) -> PolicyForecast:
    return next(one for one in found.policies if one.policy == policy)


def test_full_by_hand(folder: Path) -> None:
    """16 tokens of two assignments a rank. Projections: 2 · 768 FLOPs a token; adapters: 2 · 224; scores: 2 · 16 · 16.

    The router and adapters: 3 · (4 · 16 + 224) = 864 float32, all-reduced by 2 ranks: each sends 2 · 1/2 of them.
    """
    one = of(dry_run(folder), "full")
    assert one.parts["attention"] == 3 * 16 * (2 * 1536 + 3 * (448 + 512))
    # The shared FFN: 6 · 16 · 24 forward and as much backward; pairs of 240 parameters: 480 and three times that, two assignments a token.
    assert one.parts["experts"] == 3 * 16 * (2 * 2304 + 2 * 4 * 480)
    assert one.parts["tokens"] == 0
    assert one.parts["head"] == 16 * 2 * 2 * 16 * 32
    assert one.parts["all-reduce"] == 864 * 4
    # Each rank gets 2 experts of 960 bytes and sends 2, and as much of gradients.
    assert one.bytes.busiest_port == 3 * 2 * 2 * 960 + 3456
    assert one.bytes.near == 2 * one.bytes.busiest_port
    assert (one.bytes.far, one.bytes.busiest_uplink) == (0, 0)
    assert one.imbalance == 1
    assert one.step_seconds == sum(one.parts.values())


def recorded(*, ranks: int = 2, experts: int = 4, top_k: int = 2) -> Trace:
    """One step of three units in which the 16 tokens of each rank have chosen experts 0 and 1."""
    loads = np.zeros((1, 3, experts, ranks), np.int64)
    loads[:, :, :top_k] = 16
    return Trace(loads, (1,), tuple(Unit(layer) for layer in range(3)), (experts,) * 3, top_k, 16)


def test_recorded_loads_say_where_tokens_are_computed(folder: Path) -> None:
    """Both experts that are chosen are rank 0's, so it computes all tokens; with even loads each rank computes its share."""
    run = run_shape(config_for(folder), None, 2)
    uneven, even = (of(forecast(run, loads), "static_ep") for loads in (recorded(), "balanced"))
    assert uneven.imbalance == 2
    assert even.imbalance == pytest.approx(1, abs=0.1)
    assert uneven.memory_PD[:, 0].max() > even.memory_PD[:, 0].max()
    assert forecast(run, recorded()).as_dict()["workload"] == "recorded"


def test_a_layers_backward_pass_needs_memory_for_its_own_tokens(folder: Path) -> None:
    """The ranks take turns: rank 0 computes all tokens of the first layer, rank 1 those of the last, and each its half of the second's."""
    trace = recorded()
    loads = np.full_like(trace.loads, 8)
    loads[:, 0], loads[:, 2] = np.array([[16], [16], [0], [0]]), np.array([[0], [0], [16], [16]])
    run = run_shape(config_for(folder), None, 2)
    one = of(forecast(run, replace(trace, loads=loads)), "static_ep")
    parts = {part.name: part.bytes_PD for part in one.memory}["activations (estimate)"]
    tokens = np.full(2, (32 + 0 + 2 * distinct(16.0, 16.0, 2)) / 3)
    by_mean, by_most = (
        {part.name: part.bytes_PD for part in memory_parts(run, [np.zeros(2)], tokens, None, most)}["activations (estimate)"]
        for most in (None, np.full(2, 32.0))
    )
    backward = PHASES.index("backward")
    assert parts[backward] == pytest.approx(by_most[backward])
    assert (by_most[backward] > by_mean[backward]).all()
    assert (np.delete(by_most, backward, 0) == np.delete(by_mean, backward, 0)).all()


def test_recorded_loads_of_another_batch_are_those_of_as_many_tokens(folder: Path) -> None:
    """Rank 0 had 24 of 32 tokens, and rank 1 half as many as that: with 16 planned, the share of padding stays, and both have 12."""
    other = replace(recorded(), loads=np.array([24, 12]) * (recorded().loads > 0), tokens_per_rank=32)
    same = replace(recorded(), loads=np.array([12, 12]) * (recorded().loads > 0))
    run = run_shape(config_for(folder), None, 2)
    scaled, wanted = forecast(run, other), forecast(run, same)
    assert scaled.workload == "scaled recorded"
    for one, plain in zip(scaled.policies, wanted.policies, strict=True):
        assert one.parts == plain.parts
        np.testing.assert_array_equal(one.memory_PD, plain.memory_PD)


def test_half_of_a_steps_recorded_loads_lacks_no_token(folder: Path) -> None:
    """Each rank's 64 assignments of two micro-steps are odd numbers; one micro-step has the 32 that it has with even loads."""
    run = run_shape(config_for(folder, "gradient_accumulation_steps=2", "fssdp.rematerialize=true"), None, 2)
    odd = np.broadcast_to(np.array([17, 15, 17, 15])[None, None, :, None], (1, 3, 4, 2)).copy()
    trace = replace(recorded(), loads=odd, tokens_per_rank=32)
    assert of(forecast(run, trace), "full").parts["experts"] == of(forecast(run, "balanced"), "full").parts["experts"]


@pytest.mark.parametrize(
    ("trace", "text"),
    [
        (recorded(ranks=3), "the loads were recorded on 3 ranks, but 2 are planned\n  give --ranks or --topology with 3 devices"),
        (recorded(top_k=1), "the loads were recorded with moe.top_k: 1, but it is 2"),
        (recorded(experts=5), "no layer of the recorded loads has 4 experts, as layers of the run have; theirs have 5"),
    ],
    ids=["ranks", "top_k", "experts"],
)
def test_loads_of_other_experts_or_ranks_are_refused(folder: Path, trace: Trace, text: str) -> None:
    with pytest.raises(UserError) as caught:
        forecast(run_shape(config_for(folder), None, 2), trace)
    assert str(caught.value).startswith(text)


def test_checkpointing_repeats_the_forward_pass(folder: Path) -> None:
    plain, again = of(dry_run(folder), "static_ep"), of(dry_run(folder, "gradient_checkpointing=true"), "static_ep")
    assert again.parts["experts"] == 1.5 * plain.parts["experts"]
    assert again.parts["tokens"] == 1.5 * plain.parts["tokens"]
    assert again.parts["attention"] == 3 * 16 * (3 * 1536 + 4 * (448 + 512))


def test_owners_are_those_that_training_begins_with(folder: Path) -> None:
    """Of 4 experts a device with three times the memory owns 3, and under policy full each rank has all in the end."""
    one = of(dry_run(folder, topology=replace(slow_node(), memory=(3e9, 1e9))), "full")
    parts = {part.name: part.bytes_PD for part in one.memory}
    owned, replicas = parts["owned experts, moments"][0], parts["replicas"][0]
    assert (owned == [3 * 3 * 960 * 3, 1 * 3 * 960 * 3]).all()
    assert (replicas == [4 * 3 * 960, 4 * 3 * 960]).all()
    assert one.imbalance == 1, "who owns an expert does not say who computes it"


def test_trained_weights_cost_a_third_product(tmp_path: Path) -> None:
    """Experts that train have a forward pass and twice that backward, so that checkpointing adds a third; a plain FFN that trains, too."""
    write_model(tmp_path)
    full = ("moe.family=full", "moe.num_experts=[4,0,4]", "moe.top_k=2", "lora={}")
    plain, again = (of(dry_run(tmp_path, *full, *more), "full").parts["experts"] for more in ((), ("gradient_checkpointing=true",)))
    ffn = 16 * 2 * 3 * 16 * 24  # FLOPs of the plain layer's forward pass
    assert again - 3 * ffn == pytest.approx(4 / 3 * (plain - 2 * ffn))
    trained = of(dry_run(tmp_path, *full, "model.train_non_experts=true"), "full").parts["experts"]
    assert trained == pytest.approx(plain + ffn)


def test_private_samples_are_micro_steps(folder: Path) -> None:
    separate = ("data.separate=true", "data.packing=false", "max_grad_norm=null", "fssdp.policy=full", "lora.target_modules=[down_proj]")
    given = "moe={num_experts: 1, top_k: 1, router_aux_loss_coef: 0, router: {input: given}}"
    run = run_shape(config_for(folder, "micro_batch_size=3", "privacy.clip=1.0", given, *separate), None, 2)
    assert (run.config.gradient_accumulation_steps, run.sequences_D.tolist()) == (3, [1, 1])


def test_micro_steps_share_one_gather(folder: Path) -> None:
    """Twice the tokens; parameters, gradients and the optimizer as before; each micro-step's all-to-alls have latencies of their own."""
    slow = replace(slow_node(), intra_node=Link(1.0, 5.0))
    one, two = (dry_run(folder, f"gradient_accumulation_steps={n}", topology=slow) for n in (1, 2))
    for part, factor in {"attention": 2, "experts": 2, "head": 2, "all-reduce": 1, "optimizer": 1}.items():
        assert of(two, "full").parts[part] == pytest.approx(factor * of(one, "full").parts[part]), part
    assert of(two, "full").bytes == of(one, "full").bytes
    assert of(two, "static_ep").parts["tokens"] == pytest.approx(2 * of(one, "static_ep").parts["tokens"])


def test_rematerialization_gathers_twice_in_every_micro_step(folder: Path) -> None:
    """Two experts to a rank for the forward and two for the backward pass, two gradients back."""
    one, two = (dry_run(folder, "fssdp.rematerialize=true", f"gradient_accumulation_steps={n}") for n in (1, 2))
    assert of(one, "full").bytes.busiest_port == 3 * 2 * 3 * 960 + 3456
    assert of(two, "full").bytes.busiest_port == 2 * 3 * 2 * 3 * 960 + 3456
    for part, factor in {"attention": 2, "experts": 2, "exposed": 2, "all-reduce": 1, "optimizer": 1}.items():
        assert of(two, "full").parts[part] == pytest.approx(factor * of(one, "full").parts[part]), part
    assert of(one, "static_ep").bytes == of(dry_run(folder), "static_ep").bytes, "nothing moves"


def test_exact_plans_know_the_loads(folder: Path) -> None:
    """What follows the true loads is balanced better than what follows those of the steps before."""
    run = run_shape(config_for(folder, "data.seq_len=512"), None, 2)
    history = forecast(replace(run, topology=slow_node()), "burst")
    config = config_for(folder, "data.seq_len=512", "fssdp.plan=exact")
    exact = forecast(replace(run, config=config, topology=slow_node()), "burst")
    assert of(exact, "llep").imbalance < of(history, "llep").imbalance


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_run_whose_layers_choose_their_mode(folder: Path, micro_steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Where loads jump a policy for exact loads is planned late. What is the same in every mode is predicted as from history."""
    found = {}
    for plan in ("history", "auto"):
        config = config_for(folder, "data.seq_len=512", f"fssdp.plan={plan}", f"gradient_accumulation_steps={micro_steps}")
        found[plan] = forecast(replace(run_shape(config, None, 2), topology=slow_node()), "rotating")
    assert of(found["history"], "llep").plan_modes is None
    late = of(found["auto"], "llep").plan_modes
    assert late is not None
    assert late["history"] < 0.5
    assert of(found["auto"], "llep").step_seconds < of(found["history"], "llep").step_seconds
    for policy in ("static_ep", "full"):
        modes = of(found["auto"], policy).plan_modes
        assert modes is not None
        assert modes["history"] > 0.99, "but before a step has been measured"
        assert of(found["auto"], policy).parts == pytest.approx(of(found["history"], policy).parts, rel=1e-2)
        assert of(found["auto"], policy).bytes.near == pytest.approx(of(found["history"], policy).bytes.near, rel=1e-2)
        np.testing.assert_allclose(of(found["auto"], policy).memory_PD, of(found["history"], policy).memory_PD, rtol=1e-2)
    assert found["auto"].as_dict()["policies"][0]["plan_modes"] == found["auto"].policies[0].plan_modes
    run_plan(found["auto"].run.config, topology="two-cpu-ranks", ranks=None, loads="rotating", json_path=None)
    assert "From which loads layers were planned" in capsys.readouterr().out


def test_a_fast_rank_has_the_tokens_that_its_speed_gives_it(folder: Path) -> None:
    """Of four sequences three go to a rank that is three times as fast as the other: both need as long as the slow one for a sequence."""
    config, devices = config_for(folder, "micro_batch_size=2"), replace(slow_node(), flops=(3.0, 1.0))
    run = shape_on(config, SeenTopology(devices), "fast-and-slow")
    found, one = forecast(run, "balanced"), forecast(shape_on(config_for(folder), SeenTopology(slow_node()), "slow"), "balanced")
    for part in ("attention", "head"):
        assert of(found, "full").parts[part] == pytest.approx(of(one, "full").parts[part], rel=1e-12), part
    assert of(found, "full").parts["experts"] == pytest.approx(of(one, "full").parts["experts"], rel=1e-12)
    assert run.groups[0].cost == one.run.groups[0].cost, "what hides a gather"
    for rank, sequences in ((0, 3), (1, 1)):
        alike = shape_on(config_for(folder, f"micro_batch_size={sequences}"), SeenTopology(slow_node()), "slow")
        wanted = of(forecast(alike, "balanced"), "full").memory_PD
        np.testing.assert_allclose(of(found, "full").memory_PD[:, rank], wanted[:, rank], rtol=1e-12)


def test_layers_without_experts_keep_their_ffn(folder: Path) -> None:
    some = of(dry_run(folder, "moe.num_experts=[4,0,0]"), "full")
    assert some.parts["experts"] == 16 * (2 * 2304 + 2 * 4 * 480) + 2 * 16 * 2 * 2304


def test_a_ring_leaves_each_node_once(folder: Path) -> None:
    nodes = Topology((0, 0, 1, 1), (1.0,) * 4, (1e9,) * 4, Link(1.0, 0.0), Link(1.0, 0.0))
    one = of(dry_run(folder, topology=nodes), "full")
    gather = 3 * 2 * 960  # in each direction one copy of each of the other node's two experts, and as much back
    reduced = 2 * 3 / 4 * 3456
    assert one.bytes.busiest_uplink == pytest.approx(2 * gather + reduced)
    assert one.bytes.far == pytest.approx(2 * (2 * gather + reduced))
    # Each of four experts goes to its owner's neighbour and, over there, from the leader to its own; two ranks' parts of the ring stay.
    assert one.bytes.near == pytest.approx(2 * 3 * 4 * 2 * 960 + 2 * reduced)


def test_sharding_groups_by_hand(folder: Path) -> None:
    """Two groups of two: each gathers and reduces as two ranks alone, then the owners of two experts a layer send their sums once."""
    nodes = Topology((0, 0, 1, 1), (1.0,) * 4, (1e9,) * 4, Link(1.0, 0.0), Link(1.0, 0.0), memory_bandwidth=(1.0,) * 4)
    alone, grouped = of(dry_run(folder), "full"), of(dry_run(folder, "fssdp.shard_size=2", topology=nodes), "full")
    for part in ("attention", "experts", "tokens", "exposed", "head", "optimizer"):
        assert grouped.parts[part] == alone.parts[part], part
    summed, reduced = 3 * 2 * 960, 2 * 3 / 4 * 3456
    assert grouped.parts["all-reduce"] == 2 * summed + reduced, "both ranks of a node through its uplink"
    assert grouped.bytes.busiest_port == 3 * 2 * 2 * 960 + reduced
    assert grouped.bytes.busiest_uplink == 2 * summed + reduced
    assert grouped.bytes.far == 4 * summed + 2 * reduced
    assert grouped.bytes.near == 2 * 2 * 3 * 2 * 2 * 960 + 2 * reduced
    assert (grouped.memory_PD == np.tile(alone.memory_PD, 2)).all(), "half of the experts each"
    on_one_node = of(dry_run(folder, "fssdp.shard_size=1", topology=slow_node()), "full")
    assert on_one_node.bytes.near == 2 * (3 * 4 * 960 + 3456)
    with pytest.raises(UserError, match=r"fssdp\.shard_size: must divide the number of ranks, which is 2, got 3"):
        dry_run(folder, "fssdp.shard_size=3")


def test_the_configured_policy_comes_first_and_memory_is_compared(folder: Path) -> None:
    found = dry_run(folder, "fssdp.policy=hecate_paper")
    assert found.policies[0].policy == "hecate_paper"
    assert len({one.policy for one in found.policies}) == len(found.policies) == len(POLICIES)
    assert fits(found.policies[0], found.run)
    small = replace(found.run, topology=replace(found.run.topology, memory=(1e9, found.policies[0].memory_PD[:, 1].max() - 1)))
    assert not fits(found.policies[0], small)


def test_json_and_tables(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(config_for(folder), topology="two-cpu-ranks", ranks=None, loads="zipf", json_path=tmp_path / "plan.json")
    shown = capsys.readouterr().out
    assert "Memory of rank" in shown
    assert "One step on two-cpu-ranks, 2 ranks, zipf loads" in shown
    record = json.loads((tmp_path / "plan.json").read_text())
    assert set(record) == {"model", "topology", "ranks", "shard_size", "workload", "policy", "device_memory_bytes", "policies", "purchase"}
    first = record["policies"][0]
    assert set(first) == {"policy", "step_seconds", "seconds", "bytes", "imbalance", "plan_modes", "memory", "fits_memory"}
    assert set(first["memory"]) == {"forward", "backward", "optimizer"}
    assert all(len(by_rank) == 2 for parts in first["memory"].values() for by_rank in parts.values())
    assert first["step_seconds"] == pytest.approx(sum(first["seconds"].values()))


def test_the_table_of_a_gpu_says_what_is_counted_and_what_is_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(config_for(folder), topology="h100-node", ranks=None, loads="zipf", json_path=None)
    shown = " ".join(capsys.readouterr().out.split())
    assert "CUDA context (estimate)" in shown
    assert "allocator's rounding (at most)" in shown
    assert "fits: the device has 80000; gaps in the allocator's segments and NCCL's buffers come on top" in shown


@pytest.mark.parametrize(("speed", "unit"), [(1e6, "ms"), (1e3, "s"), (1.0, "h")])
def test_a_slow_machines_times_are_not_in_ms(folder: Path, speed: float, unit: str) -> None:
    """The units of FLOPs and bytes a second are chosen so that the step of a few hundred thousand FLOPs takes fewer than 10,000 units."""
    link = Link(speed, 0.0)
    found = dry_run(folder, topology=unit_topology((0, 0), flops=(speed,) * 2, near=link, far=link, memory_bandwidth=(speed,) * 2))
    seconds = {"ms": 1e-3, "s": 1.0, "h": 3600.0}[unit]
    (table, *_) = _policy_tables(found, 300)
    assert table.columns[1].header == unit
    spread = step_spread(found.run.topology)
    best, worst = (float(end.replace(",", "")) for end in str(next(iter(table.columns[1].cells))).split("-"))
    assert best == pytest.approx(spread.least * found.policies[0].step_seconds / seconds, rel=0.005)
    assert worst == pytest.approx(spread.most * found.policies[0].step_seconds / seconds, rel=0.005)


@pytest.mark.parametrize("width", [60, 80, 300])
def test_no_heading_is_cut_off(folder: Path, width: int) -> None:
    found = dry_run(folder)
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for table in _policy_tables(found, width):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    for name in ("policy", *found.policies[0].parts, "max/mean", "port MB", "uplink MB", "memory GB", "static_ep"):
        assert any(name in line for line in shown.splitlines()), name
    assert (shown.count("┃ policy") > 1) == (width < 300)
    assert max(map(len, shown.splitlines())) <= width


def test_an_expert_larger_than_any_memory_is_planned_and_marked(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One device of a kilobyte: there is a plan, and it says that it does not fit."""
    place = tmp_path / "tiny.yaml"
    place.write_text("nodes: [{devices: 1, flops: 1.0e+9, memory: 1.0e+3}]\nintra_node: {bandwidth: 1.0e+9, latency: 0}")
    run_plan(config_for(folder), topology=str(place), ranks=None, loads="zipf", json_path=None)
    shown = capsys.readouterr().out
    assert "does not fit: the device has 0" in shown
    assert "auto*" in shown
    place.write_text("nodes: [{devices: 1, flops: 1.0e+9, memory: 1.0e+3}]\nintra_node: {bandwidth: 0, latency: 0}")
    with pytest.raises(UserError, match=r"tiny\.yaml: intra_node\.bandwidth: must be finite and positive, got 0"):
        run_plan(config_for(folder), topology=str(place), ranks=None, loads="zipf", json_path=None)


def test_an_unknown_workload_lists_what_exists(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--workload all: unknown\n  there are balanced, "):
        run_plan(config_for(folder), topology=None, ranks=2, loads="all", json_path=None)
