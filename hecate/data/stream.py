"""The endless stream of a training run's sequences, one global step at a time.

Every rank runs the same stream and picks its own sequences out of each global step, so a step holds the same sequences at every
world size.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from hecate.data.mixture import Mixture
from hecate.data.pack import Piece, pack, take_sequence
from hecate.data.sequences import PackedSequence, build_sequence, piece_of
from hecate.data.sources import TokenSource
from hecate.errors import UserError

_COUNTED_SAMPLES = 50_000


class TrainStream:
    """An endless, resumable series of global steps, each of `sequences_per_step` sequences."""

    def __init__(self, sources: Sequence[TokenSource], *, seq_len: int, packing: bool, sequences_per_step: int, seed: int) -> None:
        assert sources, "no sources"
        assert sequences_per_step > 0, sequences_per_step
        self.sources = tuple(sources)
        self.seq_len = seq_len
        self.packing = packing
        self.sequences_per_step = sequences_per_step
        self._seed = seed
        self._mixture = Mixture([len(s) for s in sources], [s.weight for s in sources], seed)
        self._waiting: list[Piece] = []
        self._sequences = 0
        # The order of sequences depends on these values. A state saved under other values would silently continue with other sequences,
        # so `load_state_dict` refuses it. Names only serve error messages: a source may be renamed, as when its file was moved.
        self._identity = {
            "seed": seed,
            "seq_len": seq_len,
            "packing": packing,
            "sources": [{"name": s.name, "weight": s.weight, "digest": s.digest()} for s in sources],
        }

    def next_step(self) -> list[PackedSequence]:
        """Return the next global step: exactly `sequences_per_step` sequences, the same on every rank."""
        return [self._next_sequence() for _ in range(self.sequences_per_step)]

    def state_dict(self) -> dict[str, Any]:
        """Return all that the following sequences depend on, as plain JSON values.

        The waiting samples are at most 64, or as many as have the tokens of two sequences.
        """
        return {
            "identity": self._identity,
            "mixture": self._mixture.state_dict(),
            "waiting": [[piece.source, piece.sample] for piece in self._waiting],
            "rows": self._sequences,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Change nothing, and raise what `load_state_dict` would.

        Raises:
            UserError: data or settings have changed since.
            KeyError, TypeError, ValueError: the values are no position in these data.
        """
        if changes := _changes(state["identity"], self._identity):
            raise UserError(
                "the checkpoint's data order cannot be continued:\n"
                + "\n".join(changes[:5])
                + "\nuse the data, tokenizer and settings that the checkpoint was saved with, or start a new run"
            )
        self._mixture.check_state_dict(state["mixture"])
        for source, sample in state["waiting"]:
            if not (_is_below(source, len(self.sources)) and _is_below(sample, len(self.sources[source]))):
                raise ValueError(f"there is no sample {str(sample)[:100]} of source {str(source)[:100]}")
        if type(state["rows"]) is not int:
            raise TypeError("the number of sequences so far is no whole number")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state` was saved. Raises as `check_state_dict`."""
        self.check_state_dict(state)
        self._mixture.load_state_dict(state["mixture"])
        self._waiting = [piece_of(self.sources, source, sample) for source, sample in state["waiting"]]
        self._sequences = state["rows"]

    @cached_property
    def sequences_per_epoch(self) -> float:
        """The number of sequences that an epoch makes: as many samples as all sources have together, drawn by their weights.

        It does not depend on the number of ranks. Where samples are packed, it is counted up to 50,000 samples; of more samples, it is
        what the first 50,000 make, times how many times more they are.
        """
        samples = sum(len(source) for source in self.sources)
        if not self.packing:
            return samples
        counted = min(samples, _COUNTED_SAMPLES)
        order = Mixture([len(s) for s in self.sources], [s.weight for s in self.sources], self._seed)
        pieces = (piece_of(self.sources, source, sample) for source, sample in islice(order, counted))
        return sum(1 for _ in pack(pieces, self.seq_len, self.packing)) * samples / counted

    def few_samples(self) -> str | None:
        """Say that a step trains on the same samples more than once, because all of them together do not fill one; None: they do."""
        sequences = 0
        everything = ((source, sample) for source in range(len(self.sources)) for sample in range(len(self.sources[source])))
        for _ in pack((piece_of(self.sources, *place) for place in everything), self.seq_len, self.packing):
            sequences += 1
            if sequences == self.sequences_per_step:
                return None
        samples, packed = sum(len(source) for source in self.sources), " packed" if self.packing else ""
        return (
            f"few data: {samples} samples make {sequences}{packed} sequences of {self.seq_len} tokens, and each step takes "
            f"{self.sequences_per_step}, so that it trains on a sample about {self.sequences_per_step / sequences:.1f} times\n"
            "  add data, or use a smaller micro_batch_size, fewer gradient_accumulation_steps or fewer ranks"
            + (", or a smaller data.seq_len" if self.packing else "")
        )

    def _next_sequence(self) -> PackedSequence:
        pieces = (piece_of(self.sources, source, sample) for source, sample in self._mixture)
        chosen = take_sequence(self._waiting, pieces, self.seq_len) if self.packing else [next(pieces)]
        sequence = build_sequence(self._sequences, chosen, self.sources)
        self._sequences += 1
        return sequence


def _is_below(index: Any, count: int) -> bool:
    return type(index) is int and 0 <= index < count


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence for each value in which the saved identity differs from this run's."""
    changes = [f"{key} was {then[key]}, is {now[key]}" for key in ("seed", "seq_len", "packing") if then[key] != now[key]]
    if len(then["sources"]) != len(now["sources"]):
        names_then, names_now = (", ".join(source["name"] for source in identity["sources"]) for identity in (then, now))
        return [*changes, f"the sources were {names_then}, are {names_now}"]
    for before, after in zip(then["sources"], now["sources"], strict=True):
        if before["weight"] != after["weight"]:
            changes.append(f"the weight of source {after['name']} was {before['weight']}, is {after['weight']}")
        if before["digest"] != after["digest"]:
            renamed = f" (then named {before['name']})" if before["name"] != after["name"] else ""
            changes.append(f"the samples of source {after['name']}{renamed}, or how they are tokenized, have changed")
    return changes
