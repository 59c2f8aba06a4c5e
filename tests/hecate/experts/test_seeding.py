from __future__ import annotations

import math

import pytest
import torch

from hecate.experts.seeding import generator, linear_weight, unit_numbers
from hecate.parallel.values.units import Unit


def draw(*name: int | str) -> list[int]:
    return torch.randint(1 << 60, (4,), generator=generator(*name)).tolist()


@pytest.mark.parametrize(
    ("name", "digest"),
    # The digests are those of `printf NAME | b2sum -l 64`. Were they to change, so would the initial values of every run.
    [((5, "expert", 2, 7, "gate_proj"), "e7c857a6d65623d2"), ((0, "router", 0), "7826ee4645c7a1ae")],
)
def test_the_seed_of_a_name_lasts(name: tuple[int | str, ...], digest: str) -> None:
    assert generator(*name).initial_seed() == int.from_bytes(bytes.fromhex(digest), "little") // 2


def test_the_same_name_gives_the_same_numbers() -> None:
    assert draw(1, "expert", 2, 3, "up_proj") == draw(1, "expert", 2, 3, "up_proj")


def test_other_names_give_other_numbers() -> None:
    names = [
        (1, "expert", 2, 3, "up_proj"),
        (2, "expert", 2, 3, "up_proj"),
        (1, "expert", 3, 2, "up_proj"),
        (1, "expert", 2, 3, "down_proj"),
        (1, "expert", 23, "up_proj"),
        (1, "router", 2),
        (1, "lora", "2.self_attn.q_proj"),
    ]
    assert len({tuple(draw(*name)) for name in names}) == len(names)


def test_every_unit_has_numbers_of_its_own() -> None:
    """Those of a layer's FFN are the layer alone: they are in the dropout of every run so far."""
    units = [Unit(4), Unit(5), Unit(4, "self_attn.q_proj"), Unit(5, "self_attn.q_proj"), Unit(4, "self_attn.k_proj")]
    assert unit_numbers(units[0]) == (4,)
    assert len({unit_numbers(unit) for unit in units}) == len(units)


def test_the_global_generator_neither_matters_nor_moves() -> None:
    torch.manual_seed(0)
    first, state = draw(4, "x"), torch.get_rng_state()
    torch.manual_seed(1)
    assert draw(4, "x") == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_kaiming_is_uniform_within_one_over_the_root_of_the_inputs() -> None:
    a = linear_weight(64, 100, generator(0, "a"))
    assert a.shape == (64, 100)
    assert a.dtype == torch.float64
    bound = 1 / math.sqrt(100)
    assert float(a.abs().max()) <= bound
    # Mean 0 and variance bound^2 / 3, within 4 standard errors of 6400 draws.
    assert abs(float(a.mean())) < 4 * bound / math.sqrt(3 * 6400)
    assert float(a.var()) == pytest.approx(bound**2 / 3, rel=0.05)
