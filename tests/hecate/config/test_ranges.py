import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.config import ConfigError
from hecate.config.problems import Refused
from hecate.config.ranges import COUNT, POSITIVE, SHARE, WHOLE, Range
from hecate.config.scalars import not_text, read_float, read_int
from tests.hecate.config.making import MINIMAL, load, reuse_folder


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (COUNT, (1, 2**31 - 1), (0, 0.5, 2**31), ">= 1 and <= 2147483647"),
        (WHOLE, (0, 2**31 - 1), (-1, 2**31), ">= 0 and <= 2147483647"),
        (POSITIVE, (1e-300, 1e300), (0, -1.0, math.nan), "> 0"),
        (SHARE, (0, 0.5, 1), (-1e-9, 1 + 1e-9), ">= 0 and <= 1"),
        (Range(0, 1, high_open=True), (0, 0.999), (1, math.inf), ">= 0 and < 1"),
        (Range(1, 2, low_open=True, high_open=True), (1.5,), (1, 2), "> 1 and < 2"),
    ],
)
def test_what_a_range_holds_and_how_it_is_said(allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...], text: str) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == text


@reuse_folder
@given(
    key=st.sampled_from(["max_steps", "micro_batch_size", "lora.r", "moe.top_k", "fssdp.load_window", "nproc"]),
    value=st.integers(max_value=0) | st.integers(min_value=2**31),
)
def test_counts_outside_their_range_are_refused(folder: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL, f"{key}={value}")
    assert {p.key for p in caught.value.problems} == {key}


@reuse_folder
@given(
    key=st.sampled_from(["learning_rate", "lora.alpha", "max_grad_norm", "weight_decay", "lora.dropout"]),
    value=st.floats(max_value=-1e-300, allow_nan=False) | st.sampled_from([math.nan, math.inf]),
)
def test_negative_and_unbounded_numbers_are_refused(folder: Path, key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL, f"{key}={value!r}")
    assert [p.key for p in caught.value.problems] == [key]


@reuse_folder
@given(experts=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), top_k=st.integers(1, 7))
def test_top_k_fits_the_smallest_layer_with_experts(folder: Path, experts: list[int], top_k: int) -> None:
    fits = all(top_k <= count for count in experts if count > 0)
    overrides = (f"moe.num_experts={experts}", f"moe.top_k={top_k}")
    if fits:
        assert load(MINIMAL, *overrides).moe.top_k == top_k
        return
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL, *overrides)
    assert [p.key for p in caught.value.problems] == ["moe.top_k"]


@given(st.integers(-(10**18) + 1, 10**18 - 1))
def test_every_decimal_integer_is_read_as_itself(value: int) -> None:
    assert read_int(str(value), True) == value
    assert not_text(str(value)) == "a number"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_as_python_writes_it_is_read_as_itself(value: float) -> None:
    assert read_float(repr(value), True) == value


@given(st.from_regex(r"[-+]?0[0-9_]+|[0-9]+_[0-9_]*|[0-9]+:[0-5][0-9]|0[xo][0-7]+|0b[01]+", fullmatch=True))
def test_no_number_of_two_readings_is_taken(text: str) -> None:
    for read in (read_int, read_float):
        with pytest.raises(Refused):
            read(text, True)
    assert not_text(text)
