"""Routing that samples bring: which experts each of their tokens goes to, in every MoE layer.

A record has it in the key `routed_experts`, integers [tokens, layers, top_k], as nested lists or as the base64 text of a .npy file. The
latter is how vLLM's server returns it (--enable-return-routed-experts), for all tokens but the last one, with which no pass was made.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecate.io.npz import array_of

KEY = "routed_experts"
_LIMIT = 1 << 15
"""The most experts of a layer, whose numbers are held as int16."""


class BadRoutingError(Exception):
    """A sample's routing cannot be used; the text says why, in one line."""


@dataclass(frozen=True)
class RoutingShape:
    """What the routing of every sample must fit."""

    experts_per_layer: tuple[int, ...]
    """The number of experts in every decoder layer of the model; 0: the layer has none."""
    top_k: int

    def __post_init__(self) -> None:
        assert max(self.experts_per_layer) <= _LIMIT, self.experts_per_layer

    @property
    def moe_layers(self) -> list[int]:
        """The numbers of the layers that have experts."""
        return [layer for layer, experts in enumerate(self.experts_per_layer) if experts]

    def routing(self, record: Mapping[str, Any]) -> NDArray[np.int16]:
        """The routing of a record, [tokens, MoE layers, top_k].

        A record may also have a row for each decoder layer; those of layers without experts are then left out, whatever they hold.

        Raises:
            BadRoutingError: there is none, it is of another form, or it names an expert that a layer does not have, or twice for a token.
        """
        layers = self.moe_layers
        wanted = f"integers [tokens, {len(layers)} layers, {self.top_k} experts]"
        if problem := why_no_routing(record):
            raise BadRoutingError(problem)
        found = _array(record[KEY], wanted)
        if found.ndim == 3 and found.shape[1] == len(self.experts_per_layer):
            found = found[:, layers]
        if found.ndim != 3 or found.dtype.kind not in "iu" or found.shape[1:] != (len(layers), self.top_k):
            raise BadRoutingError(f"{KEY} must be {wanted}, got {found.dtype} of the shape {list(found.shape)}")
        experts_L = np.array([self.experts_per_layer[layer] for layer in layers])
        beyond = (found < 0) | (found >= experts_L[:, None])
        if beyond.any():
            token, place, k = (int(i) for i in np.argwhere(beyond)[0])
            what = f"{KEY} names expert {found[token, place, k]} for token {token}"
            raise BadRoutingError(f"{what}, but layer {layers[place]} has 0 to {experts_L[place] - 1}")
        ordered = np.sort(found, axis=-1)
        twice = ordered[..., 1:] == ordered[..., :-1]
        if twice.any():
            token, place, k = (int(i) for i in np.argwhere(twice)[0])
            raise BadRoutingError(f"{KEY} names expert {ordered[token, place, k]} twice for token {token} in layer {layers[place]}")
        return found.astype(np.int16)


def require_length(routed: NDArray[np.int16], fewest: int, most: int) -> None:
    """Raises BadRoutingError: it is not of from `fewest` tokens, those that are trained on, to `most`, all that the sample has."""
    if not fewest <= len(routed) <= most:
        what = f"{KEY} is of {len(routed)} tokens, but the sample has {most}, of which the first {fewest} are read"
        raise BadRoutingError(f"{what}: it was recorded with another text, tokenizer or chat template")


def why_no_routing(record: Mapping[str, Any]) -> str:
    """Why a record has no routing at all; empty: it has some."""
    if record.get(KEY) is not None:
        return ""
    keys = ", ".join(sorted(map(str, record))[:8]) or "none"
    return f"no {KEY!r} beside the text, but moe.replay needs it; hecate eval --record-routing FILE writes it (its other keys: {keys})"


def routing_text(routed: NDArray[np.int16]) -> str:
    """The base64 text of a .npy file, in the narrowest type that all experts' numbers fit."""
    narrow = routed.astype(np.uint8) if routed.size == 0 or int(routed.max()) < 1 << 8 else routed
    buffer = io.BytesIO()
    np.save(buffer, narrow, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _array(value: Any, wanted: str) -> NDArray[Any]:
    if not isinstance(value, str):
        try:
            return np.array(value)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BadRoutingError(f"{KEY} must be {wanted}, got lists of several lengths or of other things") from error
    try:
        return array_of(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError) as error:  # an ArrayError is a ValueError
        raise BadRoutingError(f"{KEY} is a text, but not the base64 text of a .npy file: {str(error)[:80]}") from error
