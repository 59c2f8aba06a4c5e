from __future__ import annotations

import pytest

from hecate.parallel.values.units import Unit, expert_name, parse_unit


@pytest.mark.parametrize(("unit", "text"), [(Unit(3), "3"), (Unit(12, "self_attn.q_proj"), "12.self_attn.q_proj")])
def test_a_unit_and_its_text(unit: Unit, text: str) -> None:
    assert str(unit) == text
    assert parse_unit(text) == unit
    assert expert_name(unit, 7) == f"{text}.7"


@pytest.mark.parametrize("text", ["", "x", "3.", "03", "3.ffn", " 3", "-.q_proj"])
def test_what_names_no_unit(text: str) -> None:
    with pytest.raises(ValueError):
        parse_unit(text)


def test_units_are_in_the_order_of_layers() -> None:
    assert sorted([Unit(10), Unit(2), Unit(2, "mlp.up_proj")]) == [Unit(2), Unit(2, "mlp.up_proj"), Unit(10)]
