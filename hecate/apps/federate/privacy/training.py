"""What a training with `privacy.clip` does: it checks its data, hides the samples of each step, and says what it has told of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hecate.apps.federate.privacy.accountant import PrivacySpent, privacy_spent, sampling_rate
from hecate.apps.federate.privacy.hidden_samples import HiddenSamples, Privacy
from hecate.apps.federate.privacy.settings import privacy_keys
from hecate.config import Config
from hecate.data.separate_streams import Stream
from hecate.data.sequences import PackedSequence
from hecate.data.sources import TokenSource
from hecate.errors import UserError
from hecate.train.build import RunParts
from hecate.train.extensions.extension import StepExtension
from hecate.train.extensions.of_apps import TrainingAddition


class PrivateTraining(TrainingAddition):
    """The section `privacy` in a training."""

    def check_data(self, parts: RunParts) -> None:
        """Raises UserError: a step takes a sample more than once, or a document is several samples."""
        for source, taken in _taken_by_step(parts.stream, parts.config):
            sampling_rate(source.name, len(source), taken)
            require_whole_records(source, parts.config.data.seq_len)

    def extension(self, parts: RunParts, step: int, sequences: Sequence[PackedSequence]) -> StepExtension:
        samples = _samples_of_source(sequences, len(parts.config.data.train))
        return HiddenSamples(privacy_of(parts.config), parts.moe.engine.shards, samples, step)

    def outcome(self, parts: RunParts, steps: int) -> list[tuple[str, str]]:
        return [(f"privacy of {name}", str(spent)) for name, spent in spent_by_source(parts, steps).items()]


ADDITION = PrivateTraining()


def spent_by_source(parts: RunParts, steps: int) -> dict[str, PrivacySpent]:
    """What so many steps have told of each source's samples, by its name; nothing without `privacy.noise`."""
    keys, steps = privacy_keys(parts.config), parts.config.data.skip_steps + steps
    if not keys.noise:
        return {}
    return {
        source.name: privacy_spent(noise=keys.noise, delta=keys.delta, samples=len(source), samples_per_step=taken, steps=steps)
        for source, taken in _taken_by_step(parts.stream, parts.config)
    }


def privacy_of(config: Config) -> Privacy:
    """What the configuration says of privacy, with privacy.clip."""
    keys = privacy_keys(config)
    assert keys.clip is not None
    names = tuple(source.name for source in config.data.train)
    return Privacy(clip=keys.clip, noise=keys.noise, seed=config.seed, first_step=config.data.skip_steps, sources=names)


def require_whole_records(source: TokenSource, seq_len: int) -> None:
    """Check that each record of a source is one sample, so that what is said of a sample holds for a record.

    Raises:
        UserError: a document is longer than `seq_len` tokens, and was cut into several samples, each of which would be clipped by itself.
    """
    numbers, count = np.unique(source.lines, return_counts=True)
    if cut := numbers[count > 1].tolist():
        raise UserError(
            f"privacy.clip: {len(cut)} documents of {source.path} were cut into several samples, so that each would count several times\n"
            f"  the first is record {cut[0]}; make documents shorter, or data.seq_len larger, which is {seq_len}"
        )


def _taken_by_step(stream: Stream, config: Config) -> list[tuple[TokenSource, float]]:
    """Each source with how many samples a step takes of it, where a sequence is a sample; by the weights, a mean."""
    whole = sum(source.weight for source in stream.sources)
    shares = [1 / len(stream.sources) if config.data.separate else source.weight / whole for source in stream.sources]
    return [(source, share * stream.sequences_per_step) for source, share in zip(stream.sources, shares, strict=True)]


def _samples_of_source(sequences: Sequence[PackedSequence], sources: int) -> list[int]:
    """Samples by source."""
    found = [source for one in sequences for source, _ in one.samples]
    return np.bincount(found, minlength=sources).tolist()
