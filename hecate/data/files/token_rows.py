"""Read rows that are token ids already: `input_ids`, with `labels` or masks that say which of them are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecate.data.chat.turns import BadRecord

_IGNORED = -100  # the label of a token that adds nothing to the loss, as torch and transformers have it
_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
"""The names of masks, of which TRL reads the last two; a token is learned if each mask that the row has says so."""


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One row."""

    ids: NDArray[np.int32]  # [n]
    learned: NDArray[np.bool_]  # [n]; of the first token nothing can be learned
    masked: bool
    """Whether the row said what is learned; else it is a document, of which all is."""


def take_token_row(record: dict[str, Any]) -> TokenRow:
    """Remove `input_ids`, `labels`, masks and `attention_mask` from the record and return what they say; padding is left out.

    Labels are those of their own tokens, not shifted: an id again, or -100.

    Raises:
        BadRecord: a list is missing, has other values or another length, or labels are not those of their tokens.
    """
    ids = _numbers(record, "input_ids")
    if ids is None or not len(ids):
        raise BadRecord("input_ids must be a list of token ids")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise BadRecord("input_ids has a number that is no token id")
    learned, masked = np.ones(len(ids), np.bool_), False
    for name in ("labels", *_MASKS):
        values = _numbers(record, name, len(ids))
        if values is not None:
            masked = True
            learned &= _labelled(ids, values) if name == "labels" else _as_mask(values, name)
    if (attended := _numbers(record, "attention_mask", len(ids))) is not None:
        kept = np.flatnonzero(_as_mask(attended, "attention_mask"))
        if not len(kept) or len(kept) != kept[-1] - kept[0] + 1:
            raise BadRecord("attention_mask leaves out tokens between others, not padding at the ends")
        part = slice(kept[0], kept[-1] + 1)
        ids, learned = ids[part], learned[part]
    for name in ("input_ids", "labels", "attention_mask", *_MASKS):
        record.pop(name, None)
    return TokenRow(ids.astype(np.int32), learned, masked)


def _numbers(record: dict[str, Any], name: str, length: int | None = None) -> NDArray[Any] | None:
    value = record.get(name)
    if value is None:
        return None
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):  # of lists of several lengths
        found = np.empty((0, 0))
    if not isinstance(value, list) or found.ndim != 1 or (len(found) and found.dtype.kind not in ("iub" if length else "iu")):
        raise BadRecord(f"{name} must be a list of whole numbers")
    if length is not None and len(found) != length:
        raise BadRecord(f"{name} has {len(found)} numbers, but input_ids has {length}")
    return found


def _as_mask(values: NDArray[Any], name: str) -> NDArray[np.bool_]:
    if not np.isin(values, (0, 1)).all():
        raise BadRecord(f"{name} must be a list of 0 and 1")
    return values.astype(np.bool_)


def _labelled(ids: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.bool_]:
    learned: NDArray[np.bool_] = labels != _IGNORED
    if (wrong := np.flatnonzero(learned & (labels != ids))).size:
        at = int(wrong[0])
        raise BadRecord(
            f"labels[{at}] is {labels[at]}, but input_ids[{at}] is {ids[at]}: a label is its own token, not the next one, or {_IGNORED}"
        )
    return learned
