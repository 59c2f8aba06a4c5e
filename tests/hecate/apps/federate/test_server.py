"""What the server makes of messages, beside dense matrices in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hecate.adapters.sets.adapter_set import AdapterSet, Merged
from hecate.adapters.sets.set_files import read_set, write_set
from hecate.adapters.sets.sums import average
from hecate.apps.federate.checks import client_weights, count_samples
from hecate.apps.federate.client import ClientPlan, Described, write_message
from hecate.apps.federate.codec import encode
from hecate.apps.federate.records import RoundRecord, add_record, line_of, read_rounds, rounds_file
from hecate.apps.federate.section.settings import ClientConfig, RefineConfig, RoundsConfig, ServerConfig
from hecate.apps.federate.server import adapter_set, aggregated, begun_with, received, stepped, sum_of_rounds, whole_error, write_pairs
from hecate.apps.federate.server_optimizer import ServerState
from hecate.apps.federate.vectors import Pairs, PairSite, VectorShape, flat, new_pairs, pairs_of, read_pairs
from hecate.errors import UserError
from tests.plain_sets import Pair, dense, weighted_sum

SITES = (
    PairSite("model.layers.0.self_attn.q_proj", 0, "self_attn.q_proj", 7, 9),
    PairSite("model.layers.1.mlp.up_proj", 1, "mlp.up_proj", 6, 11),
)
SHAPE = VectorShape(SITES, 4, 2.0, trains_a=True, dtype="float64", seed=3)
DESCRIBED = Described("models/tiny", 8, False, ("q_proj", "up_proj"))
WEIGHTS = (0.5, 0.3, 0.2)


def random_pairs(seed: int, shape: VectorShape = SHAPE) -> Pairs:
    vector = torch.randn(shape.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return pairs_of(vector, shape)


def shapes(*ranks: int) -> list[VectorShape]:
    return [SHAPE.of_rank(rank, 8 / rank) for rank in ranks]


def sets_of(of: list[VectorShape]) -> list[AdapterSet]:
    return [adapter_set(f"client {seed}", random_pairs(seed, one), one, DESCRIBED) for seed, one in enumerate(of)]


def pairs_with_scale(of: list[VectorShape], path: str) -> list[Pair]:
    return [(a, one.scale * b) for seed, one in enumerate(of) for a, b in [random_pairs(seed, one)[path]]]


def found_in(merged: Merged, path: str) -> torch.Tensor:
    terms = merged.result.read(path)
    return terms.b_Or @ terms.a_rI


def test_a_vector_holds_all_pairs_in_the_order_of_the_linears() -> None:
    pairs = random_pairs(0)
    assert SHAPE.numel == 4 * (7 + 9 + 6 + 11)
    a_rI, b_Or = pairs[SITES[0].path]
    torch.testing.assert_close(flat(pairs, SHAPE)[: 4 * 16], torch.cat([a_rI.flatten(), b_Or.flatten()]), rtol=0, atol=0)
    fixed = replace(SHAPE, trains_a=False)
    assert fixed.numel == 4 * (9 + 11)
    drawn = new_pairs(fixed)
    assert all(torch.equal(one[0], drawn[path][0]) for path, one in pairs_of(torch.zeros(fixed.numel, dtype=torch.float64), fixed).items())


def test_a_smaller_adapter_begins_with_the_first_terms_in_its_own_scale() -> None:
    server = random_pairs(0)
    (small,) = shapes(2)
    begun = pairs_of(begun_with(server, SHAPE, small), small)
    for path, (a_rI, b_Or) in server.items():
        torch.testing.assert_close(small.scale * begun[path][1] @ begun[path][0], SHAPE.scale * b_Or[:, :2] @ a_rI[:2])
    wide, narrow = new_pairs(SHAPE), new_pairs(small)
    assert all(torch.equal(narrow[path][0], wide[path][0][:2]) and not narrow[path][1].any() for path in wide)
    assert not torch.equal(new_pairs(replace(SHAPE, seed=SHAPE.seed + 1))[SITES[0].path][0], wide[SITES[0].path][0])


def test_a_message_changes_the_servers_adapter(tmp_path: Path) -> None:
    plan = ClientPlan("a", SHAPE, DESCRIBED, "", None, None, str(tmp_path / "a.up"), 1.0, None, None)
    begun, change = flat(random_pairs(0), SHAPE), flat(random_pairs(1), SHAPE)
    write_message(plan.up, encode(change, 1.0))
    assert torch.equal(flat(received(plan, begun), SHAPE), begun + change)
    assert torch.equal(flat(received(plan, None), SHAPE), change)


def test_stack_is_the_weighted_sum_of_any_ranks_and_averaging_is_not() -> None:
    of = shapes(4, 2, 1)
    for aggregate in ("stack", "average"):
        merged = aggregated(sets_of(of), WEIGHTS, RoundsConfig(aggregate=aggregate))
        missed = whole = 0.0
        for site in SITES:
            exact = weighted_sum(pairs_with_scale(of, site.path), WEIGHTS)
            missed += float(((found_in(merged, site.path) - exact) ** 2).sum())
            whole += float((exact**2).sum())
        error = (missed / whole) ** 0.5
        assert whole_error(merged) == pytest.approx(error, rel=1e-9, abs=1e-14)
        assert error < 1e-12 if aggregate == "stack" else error > 0.1
        assert merged.result.rank == (7 if aggregate == "stack" else 4)


def test_averages_are_of_padded_factors() -> None:
    of = shapes(4, 2)
    merged = aggregated(sets_of(of), (0.5, 0.5), RoundsConfig())
    (a, b), (short_a, short_b) = pairs_with_scale(of, SITES[0].path)
    mean_a, mean_b = a / 2, b / 2
    mean_a[:2] += short_a / 2
    mean_b[:, :2] += short_b / 2
    torch.testing.assert_close(found_in(merged, SITES[0].path), dense((mean_a, mean_b)), rtol=1e-12, atol=1e-12)


def test_refine_misses_less_than_averaging_and_lego_gives_equal_clients_their_adapter() -> None:
    sets = sets_of(shapes(4, 4, 4))
    averaged = whole_error(aggregated(sets, WEIGHTS, RoundsConfig()))
    assert 0.1 < whole_error(aggregated(sets, WEIGHTS, RoundsConfig(aggregate="refine", refine=RefineConfig(ridge=0.01)))) < averaged
    one = aggregated(sets[:1] * 3, (1 / 3, 1 / 3, 1 / 3), RoundsConfig(aggregate="lego"))
    (pair,) = pairs_with_scale(shapes(4), SITES[1].path)
    torch.testing.assert_close(found_in(one, SITES[1].path), dense(pair), rtol=1e-9, atol=1e-9)
    assert whole_error(one) < 1e-9


def test_the_servers_optimizer_steps_by_the_mean_change() -> None:
    state = ServerState(flat(random_pairs(9), SHAPE))
    adapters = {str(seed): random_pairs(seed) for seed in range(3)}
    rounds = RoundsConfig(server=ServerConfig(learning_rate=0.5))
    mean = sum(weight * flat(one, SHAPE) for one, weight in zip(adapters.values(), WEIGHTS, strict=True))
    assert isinstance(mean, torch.Tensor)
    wanted = state.vector + 0.5 * (mean - state.vector)
    torch.testing.assert_close(stepped(state, adapters, SHAPE, WEIGHTS, rounds).vector, wanted, rtol=1e-12, atol=1e-12)


def test_the_rounds_results_add_up(tmp_path: Path) -> None:
    of = shapes(4, 2)
    for number, one in enumerate(of):
        scaled = {path: (a, one.scale * b) for path, (a, b) in random_pairs(number, one).items()}
        unscaled = one.of_rank(one.rank, 1.0)
        write_pairs(tmp_path / str(number), scaled, unscaled, replace(DESCRIBED, alpha=one.rank))
        torch.testing.assert_close(flat(read_pairs(tmp_path / str(number), unscaled), unscaled), flat(scaled, unscaled))
    merged = sum_of_rounds([tmp_path / "0", tmp_path / "1"], SHAPE, [4, 2], DESCRIBED)
    write_set(merged, tmp_path / "sum")
    whole = read_set(tmp_path / "sum")
    assert (whole.rank, whole.scale) == (6, 1.0)
    for site in SITES:
        terms, pairs = whole.read(site.path), pairs_with_scale(of, site.path)
        torch.testing.assert_close(terms.b_Or @ terms.a_rI, dense(pairs[0]) + dense(pairs[1]), rtol=1e-9, atol=1e-9)


def test_parts_are_shares_of_the_samples_of_those_that_are_there(tmp_path: Path) -> None:
    clients = [ClientConfig(data=f"{name}.jsonl", name=name) for name in "abc"]
    assert client_weights(clients[:2], {"a": 30, "b": 10, "c": 60}) == {"a": 0.75, "b": 0.25}
    given = [replace(client, weight=weight) for client, weight in zip(clients, (0.5, 0.3, 0.2), strict=True)]
    assert client_weights(given[1:], {"b": 1, "c": 1}) == {"b": pytest.approx(0.6), "c": pytest.approx(0.4)}
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "c"}\n')
    assert count_samples(ClientConfig(data=str(path), name="a")) == 2
    path.write_text("")
    with pytest.raises(UserError, match=r"rounds.clients: a has no samples: .*is empty"):
        count_samples(ClientConfig(data=str(path), name="a"))
    path.write_text('{"prompt": 3, "completion": "b"}\n')
    with pytest.raises(UserError, match=r"rounds.clients: a has no samples: no record of .* can be read\n  leave the client out"):
        count_samples(ClientConfig(data=str(path), name="a"))


def test_a_round_is_a_line(tmp_path: Path) -> None:
    held_out = {"union": {"x": {"loss": 1.0}, "y": {"loss": 2.0}}, "a": {"x": {"loss": 3.0}}, "b": {"x": {"loss": 4.0}}}
    record = RoundRecord(1, {"a": 0.5, "b": 0.5}, ("c",), {"a": 7, "b": 7}, {"a": 5, "b": 5}, 0.5, 0.75, held_out, {}, 61.0)
    add_record(tmp_path, record)
    add_record(tmp_path, replace(record, round=2))
    assert read_rounds(tmp_path) == [record, replace(record, round=2)]
    assert line_of(record, 3) == (
        "round 1/3 | 2 clients | without c | loss of the union 1.500, of clients 3.000 to 4.000 | error 0.5 (of averaging 0.75) | "
        "10 bytes up, 14 bytes down | 1m01s"
    )
    with rounds_file(tmp_path).open("a") as file:
        file.write("{")
    with pytest.raises(UserError, match=r"rounds.jsonl: cannot be read: .*\n  remove its last line"):
        read_rounds(tmp_path)


@pytest.mark.parametrize("trains_a", [True, False])
def test_a_union_without_the_widest_client_goes_on_with_terms_that_can_be_trained(tmp_path: Path, trains_a: bool) -> None:
    """As after a round in which that client has dropped out: its vector has its own length again, and says the same as the union."""
    wide, narrow = replace(SHAPE, trains_a=trains_a), replace(SHAPE, trains_a=trains_a).of_rank(2, 8 / 2)
    drawn = pairs_of(torch.randn(narrow.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), narrow)
    write_set(average([adapter_set("narrow", drawn, narrow, DESCRIBED)], [1.0], inexact=True), tmp_path / "union")
    found = read_pairs(tmp_path / "union", wide)
    new = new_pairs(wide)
    for path, (a_rI, b_Or) in found.items():
        torch.testing.assert_close(wide.scale * b_Or @ a_rI, narrow.scale * drawn[path][1] @ drawn[path][0], rtol=1e-6, atol=1e-6)
        assert torch.equal(a_rI[2:], new[path][0][2:])
        assert not bool(b_Or[:, 2:].any())
    assert len(flat(found, wide)) == wide.numel
