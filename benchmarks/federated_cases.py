"""The federated systems that `federated` trains beside one another, and the goals that they are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

SEEDS = (1, 2, 3)
TASKS = ("chain_sum", "gcd", "letter_counting", "count_bits", "number_sorting")
"""one for each client"""
MIXED_RANKS = (16, 8, 8, 4, 4)


@dataclass(frozen=True)
class Arm:
    """A system, or one beside which it is set."""

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    ranks: tuple[int, ...] | None = None
    """of the clients; None: all have that of `federated.TRAINING`"""


_FIXED_A: Mapping[str, object] = {"lora.pairs": "fixed_a", "learning_rate": 4e-3}


def _cellm(density: float) -> Mapping[str, object]:
    return {
        **_FIXED_A,
        "rounds.server.optimizer": "adamw",
        "rounds.server.learning_rate": 1e-2,
        "rounds.codec.down": density,
        "rounds.codec.up": density,
    }


CELLM = {"cellm 1": 1.0, "cellm 1/2": 0.5, "cellm 1/4": 0.25, "cellm 0.1": 0.1}
ARMS: tuple[Arm, ...] = (
    Arm("fedavg"),
    Arm("fedavg mixed", ranks=MIXED_RANKS),
    Arm("flora", {"rounds.aggregate": "stack", "rounds.merge_into_base": True}, MIXED_RANKS),
    Arm("lora_fair", {"rounds.aggregate": "refine"}),
    Arm("lora_fair cosine", {"rounds.aggregate": "refine", "rounds.refine.distance": "cosine"}),
    Arm("ffa", _FIXED_A),
    *(Arm(name, _cellm(density)) for name, density in CELLM.items()),
)


@dataclass(frozen=True)
class Round:
    """What one round gave."""

    union: Mapping[str, float]
    """held-out loss of the round's result, by task"""
    clients: Mapping[str, float]
    """held-out loss of each client's own adapter on its own task, before it is aggregated"""
    aggregation_error: float
    """of the result against the weighted sum of the clients' adapters, relative"""
    average_error: float
    """the same of federated averaging on these adapters"""
    bytes_up: int
    """of all clients, as sent"""
    bytes_down: int

    @property
    def loss(self) -> float:
        """Of the result, mean of the tasks."""
        return fmean(self.union.values())


@dataclass(frozen=True)
class Run:
    """What all rounds of one arm gave."""

    arm: str
    seed: int
    rounds: tuple[Round, ...]
    seconds: float
    """of the whole command, on a machine that others may use, too"""
    commit: str
    """of the program; of runs before this was noted, the commit that added them to the recording"""

    @property
    def loss(self) -> float:
        """Held-out loss after the last round, mean of the tasks."""
        return self.rounds[-1].loss

    @property
    def traffic(self) -> int:
        """Bytes of all rounds, up and down."""
        return sum(one.bytes_up + one.bytes_down for one in self.rounds)


Runs = Mapping[str, Mapping[int, Run]]
"""arm -> seed -> what it gave"""


@dataclass(frozen=True)
class Goal:
    """What an arm was to reach beside others."""

    system: str
    text: str
    needs: tuple[str, ...]
    judge: Callable[[Runs], tuple[bool, str]]

    def verdict(self, found: Runs) -> str:
        """Say whether the goal is met over the seeds that all arms have, and by which figures; or what is missing."""
        of_arms = {name: found.get(name, {}) for name in self.needs}
        seeds = sorted(set.intersection(*(set(runs) for runs in of_arms.values())))
        if not seeds:
            return f"open: no runs yet of {', '.join(name for name, runs in of_arms.items() if not runs) or 'the same seeds'}"
        met, figures = self.judge({name: {seed: runs[seed] for seed in seeds} for name, runs in of_arms.items()})
        return f"{'met' if met else 'missed'} ({len(seeds)} of {len(SEEDS)} seeds): {figures}"


def mean_loss(runs: Mapping[int, Run]) -> float:
    """Held-out loss after the last round, mean of the seeds."""
    return fmean(run.loss for run in runs.values())


def _rounds(runs: Mapping[int, Run]) -> list[Round]:
    return [one for run in runs.values() for one in run.rounds]


def _at_most(name: str, other: str, factor: float = 1.0) -> Callable[[Runs], tuple[bool, str]]:
    """The mean loss of one arm is at most this multiple of another's."""

    def judge(runs: Runs) -> tuple[bool, str]:
        got, beside = mean_loss(runs[name]), mean_loss(runs[other])
        return got <= factor * beside, f"{name} {got:.4f}, {other} {beside:.4f}, ratio {got / beside:.3f}"

    return judge


def _in_every_seed(name: str, others: tuple[str, ...]) -> Callable[[Runs], tuple[bool, str]]:
    def judge(runs: Runs) -> tuple[bool, str]:
        won = sum(all(run.loss <= runs[other][seed].loss for other in others) for seed, run in runs[name].items())
        means = ", ".join(f"{one} {mean_loss(runs[one]):.4f}" for one in (name, *others))
        return won == len(runs[name]), f"in {won} of {len(runs[name])} seeds; {means}"

    return judge


def _exact(name: str) -> Callable[[Runs], tuple[bool, str]]:
    """The result is the weighted sum of the clients' adapters, to rounding in float32."""

    def judge(runs: Runs) -> tuple[bool, str]:
        rounds = _rounds(runs[name])
        most = max(one.aggregation_error for one in rounds)
        return most < 1e-6, f"at most {most:.1e}; of averaging {fmean(one.average_error for one in rounds):.2g}"

    return judge


def _bytes_of_ffa(runs: Runs) -> tuple[bool, str]:
    ratio = sum(run.traffic for run in runs["ffa"].values()) / sum(run.traffic for run in runs["fedavg"].values())
    return ratio <= 0.577, f"{ratio:.1%} of fedavg's"


def _minutes(runs: Runs) -> tuple[bool, str]:
    most = max(run.seconds for run in runs["flora"].values()) / 60
    return most <= 20, f"{most:.1f} minutes at most"


def _residual(runs: Runs) -> tuple[bool, str]:
    ratios = [one.aggregation_error / one.average_error for one in _rounds(runs["lora_fair"]) if one.average_error]
    return max(ratios, default=1.0) <= 0.8, f"{min(ratios, default=1.0):.2f} to {max(ratios, default=1.0):.2f} of averaging's"


def _traffic(runs: Runs) -> tuple[bool, str]:
    dense = fmean(run.traffic for run in runs["cellm 1"].values())
    curve = {name: fmean(run.traffic for run in runs[name].values()) / dense for name in CELLM}
    return curve["cellm 0.1"] <= 0.15, ", ".join(
        f"{name}: {share:.3f} of the bytes, loss {mean_loss(runs[name]):.4f}" for name, share in curve.items()
    )


GOALS: tuple[Goal, ...] = (
    Goal("ffa", "averaging is exact", ("ffa",), _exact("ffa")),
    Goal("ffa", "57.6 % of the bytes of pairs of A and B", ("ffa", "fedavg"), _bytes_of_ffa),
    Goal("ffa", "loss within 2 % of fedavg's without noise", ("ffa", "fedavg"), _at_most("ffa", "fedavg", 1.02)),
    Goal("flora", "aggregation is exact", ("flora",), _exact("flora")),
    Goal("flora", "loss at most that of fedavg of padded adapters", ("flora", "fedavg mixed"), _at_most("flora", "fedavg mixed")),
    Goal("flora", "all rounds in 20 minutes", ("flora",), _minutes),
    Goal("lora_fair", "in each round at most 0.8 of the error of averaging", ("lora_fair",), _residual),
    Goal(
        "lora_fair",
        "loss at most fedavg's and ffa's, with every seed",
        ("lora_fair", "fedavg", "ffa"),
        _in_every_seed("lora_fair", ("fedavg", "ffa")),
    ),
    Goal("cellm", "at density 0.1 at most 0.15 of the dense bytes", tuple(CELLM), _traffic),
    Goal("cellm", "at density 0.1 loss within 2 % of the dense", ("cellm 0.1", "cellm 1"), _at_most("cellm 0.1", "cellm 1", 1.02)),
)
