"""Slots that follow from memory (`fssdp.memory_slots: null`), of recipes for large models on presets of clusters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hecate.apps.foresee.dry_run import forecast
from hecate.config import Config, load_config
from hecate.config.files.presets import find_preset
from hecate.model.sizes.replica_slots import replica_slots, slots_of_config
from hecate.model.sizes.run_shape import run_shape
from hecate.parallel.cluster.topology_file import load_topology


def recipe(name: str, model: str, *overrides: str, slots: int | None = None) -> Config:
    given = (f"fssdp.memory_slots={'null' if slots is None else slots}", f"model.name_or_path={model}", *overrides)
    return load_config(name, given, claim_output=False, inputs=False)


MIXTRAL = ("mixtral_8x7b", "mixtral-8x7b")


@pytest.mark.slow
def test_where_everything_fits_everywhere_it_may_be_there() -> None:
    """Qwen3-30B-A3B takes some 65 of 80 GB, with less than half of the rest for activations."""
    run = run_shape(recipe("qwen3_30b_a3b", "qwen3-30b-a3b"), "h100-node", None)
    assert replica_slots(run).tolist() == [128] * 8


@pytest.mark.parametrize("overrides", [(), ("fssdp.rematerialize=true",), ("gradient_accumulation_steps=1",)], ids=str)
def test_where_it_does_not_fit_slots_fill_the_memory(overrides: tuple[str, ...]) -> None:
    """All of Mixtral's eight experts on each device would take 96 of 80 GB. A tenth stays free, but no more than one expert would take."""
    run = run_shape(recipe(*MIXTRAL, *overrides), "h100-node", None)
    slots_D = replica_slots(run)
    assert len(set(slots_D)) == 1
    filled = forecast(run_shape(recipe(*MIXTRAL, *overrides, slots=int(slots_D[0])), "h100-node", None), "balanced")
    by_policy = {one.policy: one.memory_PD.max() for one in filled.policies}
    expert = 32 * 3 * 4096 * 14336 * 2
    assert by_policy["full"] > 72e9
    assert 72e9 - expert < by_policy["static_ep"] + slots_D[0] * expert < 72e9


def test_each_device_has_its_own_room_and_a_larger_one_has_more() -> None:
    node, larger = (run_shape(recipe(*MIXTRAL), name, None) for name in ("h100-node", "h200-node"))
    on_node, on_larger = replica_slots(node), replica_slots(larger)
    assert on_larger.tolist() == [8] * 8
    half = replace(node, topology=replace(node.topology, memory=(*node.topology.memory[:7], 40e9)))
    on_half = replica_slots(half)
    assert 0 <= on_half[7] < on_node[7]
    assert (on_half[:7] <= on_node[:7]).all(), "which own more of the experts"
    tiny = replace(node, topology=replace(node.topology, memory=(1e9,) * 8))
    assert replica_slots(tiny).tolist() == [0] * 8


def test_a_fast_device_has_less_room_beside_the_tokens_of_more_sequences() -> None:
    """Four of eight devices are three times as fast, and have three of four sequences; they own as many experts as the others."""
    run = run_shape(recipe(*MIXTRAL, "micro_batch_size=8"), "h100-node", None)
    flops = tuple(speed * share for speed, share in zip(run.topology.flops, (3.0, 1.0) * 4, strict=True))
    alike, slots_D = replica_slots(run), replica_slots(replace(run, topology=replace(run.topology, flops=flops)))
    assert (slots_D[::2] < alike[::2]).all()
    assert (slots_D[1::2] > alike[1::2]).all()


def test_a_training_asks_for_its_topology_and_cpus_have_as_many_as_experts() -> None:
    cpus, gpus = (load_topology(find_preset("topologies", "topology", name)) for name in ("two-cpu-ranks", "h100-node"))
    slots = slots_of_config(recipe(*MIXTRAL))
    assert slots(cpus) is None
    found = slots(gpus)
    assert found is not None
    np.testing.assert_array_equal(found, replica_slots(run_shape(recipe(*MIXTRAL), "h100-node", None)))
    assert slots_of_config(recipe(*MIXTRAL, slots=3))(gpus) is None
    said: list[str] = []
    unknown = slots_of_config(replace(recipe(*MIXTRAL), model=replace(recipe(*MIXTRAL).model, name_or_path="/nowhere")), said.append)
    assert unknown(cpus) is None
    assert said == []
    assert unknown(gpus) is unknown(gpus) is None
    (note,) = said
    assert "fssdp.memory_slots" in note
    assert "/nowhere" in note
    assert replica_slots(run_shape(recipe(*MIXTRAL), "two-cpu-ranks", None)).tolist() == [8, 8]
