"""The messages of a round: what they keep, to the bit; how long they are; and that nothing else is taken for one."""

import math
import struct

import pytest
import torch
from torch import Tensor

from hecate.apps.federate.codec import HEADER_BYTES, decode, encode
from hecate.errors import UserError


def vector_of(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rounded, so that many magnitudes are equal."""
    drawn = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn * 20).round().div(20).to(dtype)


def masked(vector: Tensor, kept: int) -> Tensor:
    """The largest in magnitude, of equal ones the first: by a stable sort."""
    order = sorted(range(len(vector)), key=lambda place: -abs(vector[place].item()))
    result = torch.zeros_like(vector)
    result[order[:kept]] = vector[order[:kept]]
    return result


def bits(vector: Tensor) -> bytes:
    return vector.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("density", "kept"), [(1.0, 1000), (0.9, 900), (0.1, 100), (0.03125, 32), (0.03, 30), (0.0071, 8), (1e-9, 1)])
def test_decoding_what_was_encoded_is_masking(dtype: torch.dtype, density: float, kept: int) -> None:
    vector = vector_of(1000, dtype)
    message = encode(vector, density)
    assert bits(decode(message, 1000)) == bits(masked(vector, kept))
    places = {1000: 0}.get(kept, min(125, 4 * kept))
    assert len(message) == HEADER_BYTES + places + kept * vector.element_size()


def test_a_density_is_the_decimal_number_that_is_written() -> None:
    """0.07 * 100 is 7.000000000000001 in binary numbers."""
    assert math.ceil(0.07 * 100) == 8
    vector = torch.arange(1.0, 101.0)
    assert decode(encode(vector, 0.07), 100).count_nonzero() == 7


def test_density_1_sends_every_bit_also_of_a_negative_zero() -> None:
    vector = torch.tensor([-0.0, 0.0, 1e-45, -3.0])
    assert bits(decode(encode(vector, 1), 4)) == bits(vector)


def test_zeros_are_kept_where_nothing_else_is_left() -> None:
    message = encode(torch.zeros(100), 0.5)
    assert len(message) == HEADER_BYTES + 13 + 50 * 4
    assert not decode(message, 100).any()


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        encode(torch.ones(4), density)


def test_numbers_that_are_not_finite_are_not_sent() -> None:
    with pytest.raises(UserError, match="not finite, so it cannot be sent"):
        encode(torch.tensor([1.0, math.nan]), 1)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.01])
def test_one_changed_byte_anywhere_is_refused(density: float) -> None:
    message = encode(vector_of(200), density)
    for place in range(0, len(message), 1 if density == 0.01 else 7):
        damaged = bytearray(message)
        damaged[place] ^= 1
        with pytest.raises(UserError, match="a message of a federated round was refused"):
            decode(bytes(damaged), 200)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda message: b"", "its header alone would have 32"),
        (lambda message: message[:-1], "bytes instead of"),
        (lambda message: message + b"\0", "bytes instead of"),
        (lambda message: b"PK\3\4" + message[4:], "does not begin as one"),
        (lambda message: message[:4] + b"\2" + message[5:], "of version 2"),
        (lambda message: message[:5] + b"\7" + message[6:], "no type of numbers 7"),
        (
            lambda message: message[:8] + struct.pack("<Q", 1 << 60) + message[16:],
            "is of 1152921504606846976 numbers, and 200 are expected",
        ),
        (lambda message: message[:16] + struct.pack("<Q", 1 << 60) + message[24:], "is of 1152921504606846976 numbers in 200 places"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(change, why: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=why):
        decode(change(encode(vector_of(200), 0.01)), 200)


def test_contradictions_with_a_right_checksum_are_refused() -> None:
    """A sender who computes checksums, too: places out of order or range, bits that are too many, numbers that are not finite."""
    from hecate.apps.federate.codec import _checksum

    def forged(message: bytes, at: int, part: bytes) -> bytes:
        body = bytearray(message[HEADER_BYTES:])
        body[at : at + len(part)] = part
        return message[:24] + struct.pack("<Q", _checksum(message[:24], bytes(body))) + bytes(body)

    sparse, dotted = encode(vector_of(200), 0.01), encode(vector_of(196), 0.5)
    assert bits(decode(forged(sparse, 0, sparse[HEADER_BYTES : HEADER_BYTES + 4]), 200)) == bits(decode(sparse, 200))
    for message, numel, at, part, why in (
        (sparse, 200, 4, struct.pack("<I", 200), "places are not ascending below 200"),
        (sparse, 200, 0, struct.pack("<II", 9, 9), "places are not ascending"),
        (dotted, 196, 24, b"\xf0", "its bits are not those of 98 numbers"),
        (sparse, 200, 8, struct.pack("<f", math.inf), "numbers that are not finite"),
    ):
        with pytest.raises(UserError, match=why):
            decode(forged(message, at, part), numel)
