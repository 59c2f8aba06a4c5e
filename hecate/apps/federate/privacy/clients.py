"""What the rounds of a federated run have told of the samples of its clients."""

from __future__ import annotations

from collections.abc import Mapping

from hecate.apps.federate.plans import begins_anew
from hecate.apps.federate.privacy.accountant import PrivacySpent, privacy_spent, sampling_rate
from hecate.apps.federate.privacy.settings import privacy_keys
from hecate.config import Config
from hecate.errors import UserError
from hecate.train.preflight import default_ranks


def privacy_of_clients(config: Config, samples: Mapping[str, int], rounds: int) -> dict[str, PrivacySpent]:
    """Return what so many rounds have told of each client, by name; nothing without `privacy.noise`.

    A round that a client has dropped out of counts as well: its data go on without it, and nothing says that it did not begin to train.

    Args:
        samples: of each client, by name.

    Raises:
        UserError: opacus is not installed.
    """
    privacy = privacy_keys(config)
    if not privacy.noise:
        return {}
    steps, runs = (config.max_steps, rounds) if begins_anew(config) else (rounds * config.max_steps, 1)
    return {
        name: privacy_spent(
            noise=privacy.noise,
            delta=privacy.delta,
            samples=count,
            samples_per_step=samples_of_a_step(config),
            steps=steps,
            runs=runs,
        )
        for name, count in samples.items()
    }


def check_rates(config: Config, samples: Mapping[str, int]) -> None:
    """Raises UserError: with `privacy.clip`, a step takes a sample of a client more than once."""
    if privacy_keys(config).clip is not None:
        for name, count in samples.items():
            sampling_rate(name, count, samples_of_a_step(config))


def refuse_cluster(config: Config) -> None:
    """Raises UserError: with `privacy.clip`, rounds cannot be trained on a Ray cluster."""
    if privacy_keys(config).clip is not None:
        raise UserError(
            "privacy.clip: is not supported with --address, where a step's samples depend on the devices that the cluster has\n"
            "  leave --address out"
        )


def samples_of_a_step(config: Config) -> int:
    """Return how many of its samples each client takes in a step, on the ranks that a training starts."""
    return config.micro_batch_size * config.gradient_accumulation_steps * (config.nproc or default_ranks())
