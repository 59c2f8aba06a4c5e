"""Ranges of times, and the published trainings that they come from, by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hecate.config.files.presets import preset_names
from hecate.errors import UserError
from hecate.parallel.cluster.published_runs import RUNS
from hecate.parallel.cluster.step_spread import short, step_spread
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cluster.topology_cards import CARDS, RankDevice, topology_of_devices
from hecate.parallel.cluster.topology_file import load_topology, parse_topology, topology_text

ROOT = Path(__file__).parents[3]
TOPOLOGIES = ROOT / "configs" / "topologies"


def devices(*cards: str, flops: float = 6e14) -> Topology:
    return Topology((0,) * len(cards), (flops,) * len(cards), (8e10,) * len(cards), Link(1e11, 0.0), Link(1e11, 0.0), card=cards)


def test_a_range_is_that_of_the_cards_trainings() -> None:
    """On H100 the fastest and the slowest published training reached 459.5 and 153 TFLOP/s."""
    found = step_spread(devices("H100 80GB HBM3"))
    assert (found.least, found.most) == pytest.approx((600 / 459.5, 600 / 153))
    assert not found.calibrated
    assert "uncalibrated: `hecate profile` has not run" in found.note
    assert "14 published trainings with other trainers on H100 80GB HBM3 reached 153 to 460 TFLOP/s" in found.note
    assert "(of dense models)" not in found.note
    assert "(of dense models)" in step_spread(devices("H200")).note


def test_a_step_waits_for_its_slowest_rank() -> None:
    mixed = step_spread(replace(devices("H100 80GB HBM3", "A100-SXM4-40GB"), flops=(6e14, 1.9e14)))
    assert mixed.least == pytest.approx(max(600 / 459.5, 190 / (0.5262 * 312)))
    assert mixed.most == pytest.approx(600 / 153)


def test_an_unknown_card_is_as_far_below_its_matmuls_as_others() -> None:
    found = step_spread(devices("GeForce RTX 9999", flops=1e14))
    shares = [0.6 * CARDS[card].bf16_flops / run.flops for card, runs in RUNS.items() if card in CARDS for run in runs]
    assert (found.least, found.most) == pytest.approx((min(shares), max(shares)))
    assert "no training is known here of GeForce RTX 9999" in found.note
    assert "devices without a name" in step_spread(replace(devices("x"), card=())).note


def test_a_measured_topology_is_not_called_uncalibrated() -> None:
    assert "uncalibrated" not in step_spread(replace(devices("H100 80GB HBM3"), measured=True)).note
    cpus = load_topology(TOPOLOGIES / "two-cpu-ranks.yaml")
    assert "uncalibrated" not in step_spread(cpus).note
    assert "uncalibrated" in step_spread(replace(cpus, measured=False)).note


def test_the_range_of_profiled_cpus_is_that_of_the_recording() -> None:
    rows = json.loads((ROOT / "benchmarks/results/fidelity.json").read_text())["rows"]
    over = [row["measured_ms"] / row["predicted_ms"] for row in rows]
    found = step_spread(load_topology(TOPOLOGIES / "four-cpu-ranks.yaml"))
    assert len(over) == 72
    assert (found.least, found.most) == pytest.approx((min(over), max(over)), abs=0.005)


def test_the_range_of_guessed_cpus_is_that_of_profiled_ones() -> None:
    guess = topology_of_devices([RankDevice("here")] * 2).topology
    rates = [load_topology(TOPOLOGIES / f"{name}-cpu-ranks.yaml").flops[0] for name in ("two", "four")]
    found = step_spread(guess)
    assert (found.least, found.most) == pytest.approx((guess.flops[0] / max(rates), guess.flops[0] / min(rates)), abs=0.05)


@pytest.mark.parametrize("card", RUNS)
def test_each_card_has_three_trainings_below_its_peak_with_their_sources(card: str) -> None:
    assert len(RUNS[card]) >= 3
    for run in RUNS[card]:
        assert "https://" in run.source
        assert run.flops < (CARDS[card].bf16_flops if card in CARDS else 125e12)


@pytest.mark.parametrize("name", preset_names("topologies"))
def test_each_preset_names_its_devices_and_their_trainings(name: str) -> None:
    """The file of a GPU cluster says in a comment what its table has."""
    path = TOPOLOGIES / f"{name}.yaml"
    topology, text = load_topology(path), path.read_text()
    assert topology.card or topology.measured
    for card in set(topology.card) & set(RUNS):
        rates = [run.flops / 1e12 for run in RUNS[card]]
        said = " ".join(text.split())
        if name == "mixed":
            assert f"({min(rates):.0f} to {max(rates):.0f}" in said
        else:
            numbers = re.search(r"# Published trainings on this card reached (\d+) .*? to (\d+) TFLOP/s", said)
            assert numbers is not None
            assert [int(number) for number in numbers.groups()] == [round(min(rates)), round(max(rates))]


def test_cards_and_measured_survive_a_file() -> None:
    two = devices("H100 80GB HBM3", "H200")
    for topology in (two, replace(two, card=("L4", "L4"), measured=True), replace(two, card=())):
        assert parse_topology(topology_text(topology), "there.yaml") == topology
    assert two.take([1]).card == ("H200",)


@pytest.mark.parametrize(
    ("node", "top", "message"),
    [
        ("card: 3", "", r"nodes\[0\]\.card: must be the name of the devices, such as H100 80GB HBM3, or a list of 2, got 3"),
        ("card: [L4]", "", r"nodes\[0\]\.card: must be the name"),
        ("card: L4", "measured: 1", "measured must be true or false, got 1"),
    ],
)
def test_what_a_file_may_not_say_of_cards(node: str, top: str, message: str) -> None:
    text = f"nodes: [{{devices: 2, flops: 1.0e+14, memory: 1.0e+10, {node}}}]\nintra_node: {{bandwidth: 1.0e+9, latency: 0}}\n{top}"
    with pytest.raises(UserError, match=message):
        parse_topology(text, "there.yaml")


def test_cards_must_be_given_for_all_nodes() -> None:
    node = "devices: 1, flops: 1.0e+14, memory: 1.0e+10"
    link = "{bandwidth: 1.0e+9, latency: 0}"
    with pytest.raises(UserError, match=r"nodes\[1\] has no card, but nodes\[0\] has"):
        parse_topology(f"nodes: [{{{node}, card: L4}}, {{{node}}}]\nintra_node: {link}\ninter_node: {link}", "there.yaml")
    with pytest.raises(UserError, match="2 ranks, but 1 values of card"):
        replace(devices("L4", "L4"), card=("L4",))


@pytest.mark.parametrize(("value", "text"), [(0.0001234, "0.000123"), (1.5, "1.5"), (99.94, "99.9"), (99.96, "100"), (123456.0, "123,456")])
def test_three_digits(value: float, text: str) -> None:
    assert short(value) == text
