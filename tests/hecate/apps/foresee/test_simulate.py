"""Cases and sweeps of `hecate simulate`, and the tables and files that it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.apps.foresee.cases import Case, Options, chosen_names, chosen_policies, synthetic_cases, trace_case
from hecate.apps.foresee.report import COST, SPEEDUP, print_rows, write_rows
from hecate.apps.foresee.sweep import load_sweep
from hecate.config.files.presets import find_preset, preset_names
from hecate.errors import UserError
from hecate.parallel.cost.cost_model import ExecutionMode
from hecate.parallel.plan.measured_modes import modes_of
from hecate.parallel.values.traces import Trace, save_trace
from hecate.parallel.values.units import Unit

MODEL = "{kind: mixlora, rank: 2, hidden: 8, ffn: 16, layers: 6, seq: 8, experts: 4, top_k: 2}"
TWO = Options(policies=("static_ep", "full"), steps=2)
ROW_KEYS = {
    *(
        "topology",
        "ranks",
        "model",
        "kind",
        "experts",
        "workload",
        "tokens_per_rank",
        "policy",
        "step_seconds",
        "seconds",
        "bytes",
        "imbalance",
    ),
    *("replica_bytes", "memory_bytes", "fits_memory", "planner_ms_per_layer", "tokens_per_second", COST, SPEEDUP),
    *("shard_size", "baseline_shard_size", "plan_modes", "spread", "run_steps", "first_steps", "first_seconds", "first_bytes"),
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(MODEL)
    return str(path)


def trace_file(folder: Path, num_experts: tuple[int, ...] = (4, 4), ranks: int = 2) -> Path:
    loads = np.zeros((3, len(num_experts), max(num_experts), ranks), dtype=np.int32)
    loads[:, :, :2] = 5
    units = tuple(Unit(layer) for layer in range(len(num_experts)))
    save_trace(Trace(loads, (1, 2, 3), units, num_experts, top_k=2, tokens_per_rank=5), folder / "loads.npz")
    return folder / "loads.npz"


def test_rows_are_json_of_a_fixed_form(model: str) -> None:
    (case,) = synthetic_cases("two-cpu-ranks", model, ["zipf"], 64)
    rows = case.run(TWO)
    assert [row["policy"] for row in rows] == ["static_ep", "full"]
    for row in json.loads(json.dumps(rows)):
        assert set(row) == ROW_KEYS
        parts = ("attention", "compute", "dispatch", "exposed", "optimizer", "planning", "reshard", "all_reduce")
        assert row["step_seconds"] == pytest.approx(sum(row["seconds"][part] for part in parts))
        assert set(row["bytes"]) == {"near", "far", "busiest_port", "busiest_uplink"}
    assert rows[0][SPEEDUP] == 1
    assert rows[1][SPEEDUP] == pytest.approx(rows[0]["step_seconds"] / rows[1]["step_seconds"])
    assert rows[1]["memory_bytes"] - rows[0]["memory_bytes"] == rows[1]["replica_bytes"] > 0


def test_a_gather_hides_behind_one_micro_steps_attention() -> None:
    """The attention of a step is the same in how many micro-steps it is cut."""
    (case,) = synthetic_cases("paper-cluster-a", "gpt-moe-s", ["zipf"], 65536)
    options = Options(policies=("full",), steps=2)
    (whole,), (cut,) = (case.run(replace(options, execution=ExecutionMode(micro_steps=number))) for number in (1, 8))
    assert cut["seconds"]["attention"] == pytest.approx(whole["seconds"]["attention"])
    assert cut["seconds"]["gather"] == pytest.approx(whole["seconds"]["gather"])
    hidden = [row["seconds"]["gather"] + row["seconds"]["reduce"] - row["seconds"]["exposed"] for row in (whole, cut)]
    assert 0 < hidden[1] < hidden[0] / 2


def test_speedups_are_over_expert_parallelism_in_groups(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Four experts on eight ranks: two groups of four, whose owners sum their gradients, each layer with a message."""
    (case,) = synthetic_cases("h100-node", model, ["one_hot_expert"], 4096)
    options = Options(policies=("static_ep", "auto"), steps=2)
    alone, *_ = case.run(options)
    grouped, auto = case.run(replace(options, shard_size=4))
    reduced = case.model.layers * case.model.layer_cost(4096).reduced_bytes
    link = case.topology.intra_node
    assert grouped["seconds"]["all_reduce"] == pytest.approx(reduced / link.bandwidth + case.model.layers * link.latency)
    assert alone["seconds"]["all_reduce"] == 0
    assert grouped["seconds"]["compute"] < alone["seconds"]["compute"]
    assert (grouped["baseline_shard_size"], alone["baseline_shard_size"], alone["shard_size"], grouped["shard_size"]) == (4, 4, 8, 4)
    for row in (alone, grouped, auto):
        assert row[SPEEDUP] == pytest.approx(grouped["step_seconds"] / row["step_seconds"])
    print_rows([grouped, auto])
    assert "in groups of 4 ranks" in " ".join(capsys.readouterr().out.split())


def test_layers_go_by_the_mode_that_was_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loads that jump are planned late, and a table says so; where all layers have one mode there is no such table."""
    run = "runs: [{topologies: two-h100-nodes, models: gpt-moe-s, workloads: rotating, tokens_per_rank: 2048, experts: 32}]"
    (case,), options = sweep(tmp_path, f"{{plan: auto, policies: [static_ep, auto], steps: 4, {run}}}")
    assert (options.execution, options.choose_modes) == (ExecutionMode(), modes_of("auto"))
    static, by_layer = case.run(options)
    assert static["plan_modes"] == {"history": 1, "calibrated": 0, "exact": 0}, "its plans are always the same"
    modes = by_layer["plan_modes"]
    assert sum(modes.values()) == pytest.approx(1)
    assert modes["history"] < 1, "loads jump"
    (history,) = case.run(replace(options, choose_modes=(), policies=("auto",)))
    assert by_layer["step_seconds"] < history["step_seconds"]
    assert history["plan_modes"] is None
    for wide in (False, True):
        print_rows([static, by_layer], wide=wide)
        table = capsys.readouterr().out.split("From which loads layers were planned")[1]
        assert f"{100 * modes['history']:.0f}" in table
        print_rows([history], wide=wide)
        assert "From which loads" not in capsys.readouterr().out
    with pytest.raises(UserError, match="2 micro-steps share no plan"):
        replace(options, execution=ExecutionMode(micro_steps=2))


def test_a_group_size_that_does_not_divide_the_ranks_is_refused(model: str) -> None:
    (case,) = synthetic_cases("h100-node", model, ["zipf"], 64)
    with pytest.raises(UserError, match="must divide the number of ranks, which is 8, got 3"):
        case.run(replace(TWO, shard_size=3))


def test_what_a_million_tokens_cost_by_hand(model: str, tmp_path: Path) -> None:
    """Devices of 3 and of 5 an hour take 2 x 64 tokens a step."""
    node = "{devices: 2, flops: 5.0e+10, memory: 8.0e+9, price_per_hour: [3, 5]}"
    (tmp_path / "priced.yaml").write_text(f"nodes: [{node}]\nintra_node: {{bandwidth: 1.0e+9, latency: 1.0e-4}}")
    for price, an_hour in ((None, 8.0), (1.0, 2.0)):
        (case,) = synthetic_cases(str(tmp_path / "priced.yaml"), model, ["zipf"], 64, price_per_hour=price)
        for row in case.run(TWO):
            assert row["tokens_per_second"] == pytest.approx(128 / row["step_seconds"])
            assert row[COST] == pytest.approx(an_hour / 3600 * row["step_seconds"] / 128 * 1e6)
    (free,) = synthetic_cases("two-cpu-ranks", model, ["zipf"], 64)
    assert free.run(TWO)[0][COST] is None


def test_sampled_layers_stand_for_the_model(model: str) -> None:
    """Six layers, of which four are simulated; each rank gets two experts of 2 · 3 · 24 floats, and sends as much of gradients."""
    (case,) = synthetic_cases("two-cpu-ranks", model, ["balanced"], 64)
    row = case.run(Options(policies=("full",), steps=2))[0]
    assert row["bytes"]["near"] == pytest.approx(6 * 2 * 4 * 2 * 3 * 24 * 4)
    assert row[SPEEDUP] is None


def test_experts_in_place_of_the_models(model: str) -> None:
    (case,) = synthetic_cases("two-cpu-ranks", model, ["balanced"], 64, experts=8)
    assert case.run(TWO)[0]["experts"] == 8


def test_a_trace_says_how_many_layers_and_experts_there_are(model: str, tmp_path: Path) -> None:
    case = trace_case("two-cpu-ranks", model, trace_file(tmp_path))
    row = case.run(TWO)[0]
    assert (row["workload"], row["tokens_per_rank"], row["experts"]) == ("loads", 5, 4)
    assert row["imbalance"] > 1  # experts 0 and 1, the only ones wanted, are rank 0's
    assert case.model.layers == 2


def test_megatrons_traces_are_simulated_with_the_models_number_of_experts(model: str, tmp_path: Path) -> None:
    """One step of a layer on two ranks of two tokens: a file with both ranks, and a folder with that file."""
    ranks = [{"step": 0, "layer": 1, "rank": rank, "num_tokens": 2, "topk": 2, "top_indices": [[0, 1], [0, 3]]} for rank in (0, 1)]
    (tmp_path / "trace").mkdir()
    path = tmp_path / "trace" / "trace.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ranks), encoding="utf-8")
    for given in (path, path.parent):
        case = trace_case("two-cpu-ranks", model, given)
        assert case.recorded is not None
        assert case.recorded.tolist() == [[[[2, 2], [1, 1], [0, 0], [1, 1]]]]
        assert (case.model.layers, case.model.experts, case.model.top_k) == (1, 4, 2)
        assert case.run(TWO)[0]["workload"] == "trace"


def test_what_is_wrong_with_a_trace(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recorded on 2 ranks, but topology h100-node has 8 devices"):
        trace_case("h100-node", model, trace_file(tmp_path))
    with pytest.raises(UserError, match="its layers have 3, 4 experts"):
        trace_case("two-cpu-ranks", model, trace_file(tmp_path, (4, 3)))
    with pytest.raises(UserError, match=r"nothing\.npz: cannot be read"):
        trace_case("two-cpu-ranks", model, tmp_path / "nothing.npz")


def test_too_little_memory_is_seen(model: str, tmp_path: Path) -> None:
    """A layer's expert: 576 bytes of parameters, as much of gradients, 1728 of state. Each rank owns two in each of 6 layers.

    Attention and the shared FFN are 6 · (256 + 384) · 2 bytes; a full replica set of the other two experts 6 · 2 · 1152.
    """
    held = 6 * (2 * (576 + 576 + 1728) + 640 * 2)
    for memory, fits in ((held + 6 * 2 * 1152, True), (held + 6 * 2 * 1152 - 1, False)):
        topology = tmp_path / "tight.yaml"
        topology.write_text(f"nodes: [{{devices: 2, flops: 1.0e+9, memory: {memory}}}]\nintra_node: {{bandwidth: 1.0e+9, latency: 0}}")
        (case,) = synthetic_cases(str(topology), model, ["balanced"], 64)
        rows = case.run(TWO)
        assert [row["fits_memory"] for row in rows] == [True, fits]


@pytest.mark.parametrize(
    ("names", "expected"), [("all", ("a", "b", "c")), ("c, a", ("c", "a")), ("a,a", ("a",)), (["b"], ("b",)), (["all"], ("a", "b", "c"))]
)
def test_names_are_chosen(names: str | list[str], expected: tuple[str, ...]) -> None:
    assert chosen_names(names, ("a", "b", "c"), "--policy") == expected


def test_a_policys_former_name_is_chosen_and_a_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen_policies("full, hecate,hecate_paper", "--policy") == ("full", "hecate_paper")
    told = "the policy hecate is called hecate_paper now, as the paper's own; hecate's default is auto\n"
    assert capsys.readouterr().err == f"hecate: --policy: {told}"
    _, options = sweep(tmp_path, "policies: hecate\nruns: [{topologies: two-cpu-ranks, models: gpt-moe-s}]")
    assert options.policies == ("hecate_paper",)
    assert capsys.readouterr().err == f"hecate: {tmp_path / 'sweep.yaml'}.policies: {told}"


def test_a_placement_with_our_split_beside_the_one_of_its_authors(model: str) -> None:
    """The same experts are in the same places, and fewer tokens travel. LAER-MoE has a gather of its own, unless a route is given."""
    named = chosen_policies("laer,laer+ours", "--policy")
    assert named == ("laer", "laer+ours")
    assert not [name for name in chosen_policies("all", "--policy") if "+" in name]
    with pytest.raises(UserError, match=r"unknown: auto\+ours\n  there are all, static_ep, .*, laer\+ours"):
        chosen_policies("auto+ours", "--policy")
    (case,) = synthetic_cases("h100-node", model, ["one_hot_expert"], 4096)
    options = Options(policies=named, steps=3)
    theirs, ours = case.run(options)
    assert theirs["replica_bytes"] == ours["replica_bytes"] > 0
    assert ours["seconds"]["dispatch"] < theirs["seconds"]["dispatch"]
    assert ours["seconds"]["gather"] != theirs["seconds"]["gather"]
    flat, ours_flat = case.run(replace(options, execution=ExecutionMode(route="flat")))
    assert flat["seconds"]["gather"] == ours_flat["seconds"]["gather"]


@pytest.mark.parametrize(("names", "message"), [("a,x", "--policy: unknown: x\n  there are all, a, b"), ("", "--policy: none given")])
def test_unknown_names_are_refused(names: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen_names(names, ("a", "b"), "--policy")


def test_presets() -> None:
    assert {"gpt-moe-s", "mixtral-8x7b"} <= set(preset_names("models"))
    assert find_preset("experiments", "sweep", "paper").name == "paper.yaml"
    with pytest.raises(UserError, match=r"model nope: no such preset\n  use one of bert-moe, .*, or the path of a YAML file"):
        find_preset("models", "model", "nope")
    with pytest.raises(UserError, match=r"model \./nope\.yaml: no such file"):
        find_preset("models", "model", "./nope.yaml")


def test_the_papers_sweep_has_its_models_on_both_clusters() -> None:
    cases, options = load_sweep(find_preset("experiments", "sweep", "paper"))
    assert {"static_ep", "fastermoe", "smartmoe", "flexmoe", "hecate_paper", "auto"} <= set(options.policies)
    found = {(case.topology_name, case.model.name, case.topology.world_size, case.model.experts) for case in cases}
    models = ("gpt-moe-s", "gpt-moe-l", "bert-moe", "bert-moe-deep")
    clusters = (("paper-cluster-a", 32, 64), ("paper-cluster-b", 32, 64), ("paper-cluster-a-16", 16, 32))
    assert found == {(cluster, model, ranks, experts) for cluster, ranks, experts in clusters for model in models}
    assert len({case.workload for case in cases}) * len(found) == len(cases)


def sweep(folder: Path, text: str) -> tuple[list[Case], Options]:
    (folder / "sweep.yaml").write_text(text)
    return load_sweep(folder / "sweep.yaml")


def test_a_sweep_may_know_loads_ahead(model: str, tmp_path: Path) -> None:
    _, options = sweep(tmp_path, f"{{plan: replay, runs: [{{topologies: two-cpu-ranks, models: {model}}}]}}")
    assert options.execution == ExecutionMode(plan="replay")


def test_a_sweep_multiplies_out(model: str, tmp_path: Path) -> None:
    run = f"{{topologies: [two-cpu-ranks, four-cpu-ranks], models: {model}, workloads: [zipf, burst], tokens_per_rank: 32}}"
    cases, options = sweep(
        tmp_path, f"{{plan: exact, prefetch: 2, route: flat, steps: 3, policies: full, max_imbalance: 1.5, runs: [{run}]}}"
    )
    execution = ExecutionMode(prefetch=2, route="flat")
    assert options == Options(policies=("full",), steps=3, execution=execution, choose_modes=("calibrated", "exact"), max_imbalance=1.5)
    assert [(case.topology_name, case.workload) for case in cases] == [
        ("two-cpu-ranks", "zipf"),
        ("two-cpu-ranks", "burst"),
        ("four-cpu-ranks", "zipf"),
        ("four-cpu-ranks", "burst"),
    ]
    assert {case.tokens_per_rank for case in cases} == {32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a sweep is a mapping with the list `runs`"),
        ("{runs: []}", "a sweep is a mapping with the list `runs`"),
        ("{runs: [{models: x}]}", r"runs\[0\]: a run has the lists topologies and models"),
        ("{runs: [{topologies: h100-node, models: x, token: 2}]}", r"runs\[0\]: unknown: token"),
        ("{step: 2, runs: [{topologies: h100-node, models: x}]}", "unknown: step\n  there are policies, steps"),
        ("{steps: 0, runs: [{topologies: h100-node, models: x}]}", "steps must be an integer from 1 to 1000000000, got 0"),
        ("{plan: 1, runs: [{topologies: h100-node, models: x}]}", "plan must be one of history, calibrated, exact, replay, auto, got 1"),
        ("{rematerialize: 1, runs: [{topologies: h100-node, models: x}]}", "rematerialize must be true or false, got 1"),
        ("{prefetch: -1, runs: [{topologies: h100-node, models: x}]}", "prefetch must be an integer from 0 to 1000000000, got -1"),
        ("{route: near, runs: [{topologies: h100-node, models: x}]}", "route must be one of fastest, flat, two_level, sliced, got 'near'"),
        ("{micro_steps: 2, plan: exact, runs: [{topologies: h100-node, models: x}]}", "2 micro-steps share no plan"),
        ("{max_imbalance: 0.5, runs: [{topologies: h100-node, models: x}]}", "max_imbalance must be a number >= 1, got 0.5"),
        ("{runs: [{topologies: h100-node, models: x}]}", r"runs\[0\]: model x: no such preset"),
        ("{runs: [{topologies: [1], models: x}]}", r"runs\[0\].topologies: must be a name or a list of names, got \[1\]"),
        ("{runs: [{topologies: h100-node, models: x, workloads: [zip]}]}", r"runs\[0\].workloads: unknown: zip"),
        ("{policies: best, runs: [{topologies: h100-node, models: x}]}", "policies: unknown: best"),
        ("{runs: [", "cannot be read as a sweep"),
    ],
)
def test_a_bad_sweep_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sweep(tmp_path, text)
    assert len(str(caught.value).splitlines()) <= 8


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Two policies, the second four times as fast."""
    common: dict[str, Any] = {
        "topology": "here",
        "ranks": 2,
        "model": "small",
        "kind": "mixlora",
        "experts": 4,
        "workload": "zipf",
        "tokens_per_rank": 64,
        "seconds": dict.fromkeys(
            ("attention", "compute", "dispatch", "gather", "reduce", "exposed", "optimizer", "planning", "reshard", "all_reduce"), 0.5
        ),
        "shard_size": 2,
        "baseline_shard_size": 2,
        "bytes": {"near": 1.0, "far": 0.0, "busiest_port": 3e6, "busiest_uplink": 0.0},
        "imbalance": 1.25,
        "replica_bytes": 0.0,
        "memory_bytes": 1e9,
        "fits_memory": True,
        "planner_ms_per_layer": 0.1,
        "run_steps": 1000,
        "first_steps": 1,
        "first_seconds": 1.0,
        "first_bytes": 0.0,
        "spread": {"least": 2.0, "most": 3.0, "source": "two runs", "calibrated": False},
    }
    return [
        common | {"policy": policy, "step_seconds": seconds, SPEEDUP: 4 / seconds, COST: None, **changes}
        for policy, seconds in (("static_ep", 4.0), ("full", 1.0))
    ]


def test_one_case_is_shown_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(rows(fits_memory=False), wide=True)
    shown = capsys.readouterr().out
    assert "small with 4 experts on here (2 ranks of 64 tokens), zipf" in shown
    (line,) = [line for line in shown.splitlines() if "full*" in line]
    assert [cell.strip() for cell in line.split("│")][2:7] == ["1000.0", "4.00x", "500.0", "500.0", "500.0"]
    assert "*: does not fit the devices' memory" in shown


def test_slow_first_steps_are_shown_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that take more than twice as long as the mean step: 2 steps of 4 s, or of 1."""
    for wide in (False, True):
        print_rows(rows(first_steps=2, first_seconds=9.0, first_bytes=3e9), wide=wide)
        shown = " ".join(capsys.readouterr().out.split())
        assert "the first 2 steps, in the mean of 1,000: full 9.00 s, 3.0 GB" in shown
        print_rows(rows(first_steps=2, first_seconds=4.0), wide=wide)
        assert "the first" not in capsys.readouterr().out


def test_many_workloads_are_shown_as_speedups(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([*rows(), *rows(workload="burst", **{SPEEDUP: 9.0})], wide=True)
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "4.00x" in lines["zipf"]
    assert "9.00x" in lines["burst"]
    assert f"{math.sqrt(4 * 9):.2f}x" in lines["geo-mean"]


def test_many_models_are_shown_over_their_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([*rows(), *rows(workload="burst", **{SPEEDUP: 9.0}), *rows(model="large")], wide=True)
    shown = capsys.readouterr().out
    assert "geometric mean over 2 workloads" in " ".join(shown.split())
    (line,) = [line for line in shown.splitlines() if "small" in line and "│" in line]
    assert "6.00x" in line


def test_without_the_baseline_milliseconds_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([*rows(**{SPEEDUP: None}), *rows(workload="burst", **{SPEEDUP: None})], wide=True)
    shown = capsys.readouterr().out
    assert "Milliseconds a step" in shown
    assert "1000.0" in shown


def test_a_narrow_table_has_the_fastest_policy_first(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(rows())
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert cells == [["full", "2,000-3,000", "4.00x", "1.25", "1.0"], ["static_ep", "8,000-12,000", "1.00x", "1.25", "1.0"]]


def test_a_narrow_table_has_a_cost_where_a_price_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(rows(**{COST: 0.12345}))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "cost: of a million tokens, in the currency of price_per_hour" in shown
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [line[-1] for line in cells] == ["0.247-0.37", "0.247-0.37"]


def test_clusters_are_compared_by_cost_and_then_by_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """On the second cluster the faster policy does not fit. Nothing is known of the price of the third."""
    second = rows(topology="second", **{COST: 0.25})
    second[1]["fits_memory"] = False
    print_rows([*rows(**{COST: 0.5}), *second, *rows(topology="third", ranks=4)])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [line for line in cells if len(line) == 7] == [
        ["second", "2", "static_ep", "8,000-12,000", "10.7-16", "1.0", "0.5-0.75"],
        ["here", "2", "full", "2,000-3,000", "42.7-64", "1.0", "1-1.5"],
        ["third", "4", "full", "2,000-3,000", "85.3-128", "1.0", "-"],
    ]


def test_several_cases_are_narrowed_to_means_and_extremes(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([*rows(), *rows(workload="burst", **{SPEEDUP: 9.0}), *rows(workload="drift", **{SPEEDUP: 0.5})])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    cells = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in shown.splitlines() if "│" in line}
    assert cells["full"] == [f"{(4 * 9 * 0.5) ** (1 / 3):.2f}x", "0.50x", "drift", "9.00x", "burst"]


def test_files_are_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "new" / "rows.json", {"steps": 2}, rows())
    record = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert record["settings"] == {"steps": 2}
    assert len(record["rows"]) == 2


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(tmp_path / "file" / "rows.json", {}, rows())
