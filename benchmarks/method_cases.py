"""The systems that `methods` trains beside one another, as settings of `hecate train`, and the goals that they are held to.

Systems of one table train on the same samples in the same order, with one learning rate, but for FFA-LoRA and NOLA. Their recipes and
ALLoRA's are what is trained here; SMoRA's bias moves a hundred times as fast as in its recipe, which is for longer
runs. After 400 steps the systems that have a goal, MoLA with two of its orders, and the LoRA beside which they are set have runs with
half the rate, too (`_slower`); the better rate of each counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

SEEDS = (1, 2, 3)
TASKS = ("chain_sum", "gcd", "letter_counting", "count_bits", "number_sorting")
SHORT, LONG = 64, 400
"""optimizer steps of the two tables"""
_EVERY = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
_FFN = "[gate_proj,up_proj,down_proj]"


@dataclass(frozen=True)
class Method:
    """A system, or a plain LoRA beside which one is set."""

    name: str
    settings: Mapping[str, str]
    steps: tuple[int, ...] = (SHORT,)
    """the tables that it is in"""


def plain_lora(name: str, rank: int, *, targets: str = _EVERY, learning_rate: str = "2e-3", steps: tuple[int, ...] = (SHORT,)) -> Method:
    """One LoRA adapter on each linear, owned by a rank each like any expert, so that its bytes compare."""
    return Method(name, {**_one_pair(rank, targets), "learning_rate": learning_rate}, steps)


def _one_pair(rank: int, targets: str) -> dict[str, str]:
    return {**_linears(rank, targets), "lora.alpha": str(2.0 * rank), "moe.num_experts": "1", "moe.top_k": "1"}


def _linears(rank: int, targets: str = _EVERY) -> dict[str, str]:
    shape = {"lora.r": str(rank), "lora.target_modules": targets}
    return {**shape, "moe.unit": "linear", "moe.num_experts": "null", "moe.router_aux_loss_coef": "0"}


def _mola(allocation: str) -> Mapping[str, str]:
    """The recording has a balance loss of twice its authors' coefficient; their released commands, and the recipe, leave it off."""
    return {**_linears(8), "lora.alpha": "16.0", "moe.allocation": allocation, "moe.router_aux_loss_coef": "0.002"}


MOLA = {
    "mola_2468": "[2,4,6,8]",
    "mola_8642": "[8,6,4,2]",
    "mola_2882": "[2,8,8,2]",
    "mola_8228": "[8,2,2,8]",
    "mola_5555": "[5,5,5,5]",
}
_MIXLORA = {"lora.r": "8", "lora.alpha": "16.0", "moe.num_experts": "8"}
_SMORA = {
    **_linears(1),
    "lora.alpha": "16.0",
    "moe.num_experts": "64",
    "moe.top_k": "8",
    "moe.router.score": "sigmoid",
    "moe.router.bias": "balancing",
    "moe.router.bias_in_weights": "true",
    "moe.router.bias_rate": "1e-3",
}
_LLAVA_MOLE = {
    "lora.r": "8",
    "lora.alpha": "16.0",
    "moe.num_experts": "3",
    "moe.top_k": "1",
    "moe.router.bias": "learned",
    "moe.router.weights": "one",
    "moe.router.balance": "sample",
    "moe.router_aux_loss_coef": "0.01",
}
_NO_ALPHA = {"lora.alpha": "null", "lora.gradient_rule": "row_norm", "lora.eta": "2.0"}
METHODS: tuple[Method, ...] = (
    plain_lora("lora_r1_ffn", 1, targets=_FFN),
    plain_lora("lora_r2", 2),
    plain_lora("lora_r8", 8, steps=(SHORT, LONG)),
    plain_lora("lora_r8_slower", 8, learning_rate="1e-3", steps=(SHORT, LONG)),
    plain_lora("lora_r8_faster", 8, learning_rate="4e-3"),
    plain_lora("lora_r16", 16),
    plain_lora("lora_r16_ffn", 16, targets=_FFN),
    plain_lora("lora_r64", 64, steps=(SHORT, LONG)),
    plain_lora("lora_r64_slower", 64, learning_rate="1e-3", steps=(LONG,)),
    Method("mixlora", _MIXLORA, (SHORT, LONG)),
    Method("mixlora_slower", {**_MIXLORA, "learning_rate": "1e-3"}, (LONG,)),
    Method("smora", _SMORA, (SHORT, LONG)),
    Method("smora_slower", {**_SMORA, "learning_rate": "1e-3"}, (LONG,)),
    Method(
        "mos",
        {
            **_one_pair(16, _EVERY),
            "lora.pairs": "shards",
            "lora.shards.equivalent_rank": "2",
            "lora.shards.per_vector": "4",
            "lora.shards.private_rank": "1",
        },
    ),
    Method("nola", {**_one_pair(16, _FFN), "lora.pairs": "nola", "lora.nola.bases": "256", "learning_rate": "1e-2"}),
    Method("allora", {**_one_pair(8, _EVERY), **_NO_ALPHA}),
    Method("ffa_lora", {**_one_pair(8, _EVERY), "lora.pairs": "fixed_a", "learning_rate": "4e-3"}),
    Method("llava_mole", _LLAVA_MOLE, (SHORT, LONG)),
    Method("llava_mole_slower", {**_LLAVA_MOLE, "learning_rate": "1e-3"}, (LONG,)),
    *(Method(name, _mola(allocation), (SHORT, LONG)) for name, allocation in MOLA.items()),
    *(Method(f"{name}_slower", {**_mola(MOLA[name]), "learning_rate": "1e-3"}, (LONG,)) for name in ("mola_2468", "mola_2882")),
)


@dataclass(frozen=True)
class Run:
    """What one training gave."""

    method: str
    seed: int
    steps: int
    parameters: int
    loss: float
    """held out, mean over the tasks of the cross-entropy per label token"""
    accuracy: Mapping[str, float]
    """share of exact answers by task"""
    tokens_per_second: float
    """median of the steps"""
    tokens_per_processor_second: float
    """of the whole run with its start and its evaluation, all ranks together"""
    bytes_per_step: float
    """sent by all ranks together for experts and tokens; median"""
    peak_megabytes: float
    """largest resident memory of a rank"""
    load_spread: float
    """coefficient of variation of the loads of a unit's experts over the last quarter of the steps, mean over units; 0 with one expert"""

    @property
    def exact(self) -> float:
        """Mean over the tasks of the share of exact answers."""
        return fmean(self.accuracy.values())


Runs = Mapping[tuple[str, int], Mapping[int, Run]]
"""(method, steps) -> seed -> run"""


@dataclass(frozen=True)
class Goal:
    """What a system is to reach beside others."""

    system: str
    text: str
    steps: int
    needs: tuple[str, ...]
    """names of methods"""
    judge: Callable[[Mapping[str, Mapping[int, Run]]], tuple[bool, str]]
    """from the runs of each needed method by seed, the same seeds of all, to whether it is met and by which figures"""

    def verdict(self, runs: Runs) -> str:
        """`met`, `missed` or `open`, and the figures; of the seeds that all needed methods have."""
        found = {name: runs.get((name, self.steps), {}) for name in self.needs}
        seeds = sorted(set.intersection(*(set(of_seeds) for of_seeds in found.values())))
        if not seeds:
            missing = [name for name, of_seeds in found.items() if not of_seeds]
            return f"open: no runs yet of {', '.join(missing) or 'the same seeds'}"
        met, figures = self.judge({name: {seed: of_seeds[seed] for seed in seeds} for name, of_seeds in found.items()})
        return f"{'met' if met else 'missed'} ({len(seeds)} of {len(SEEDS)} seeds): {figures}"


def mean(runs: Mapping[int, Run], what: Callable[[Run], float]) -> float:
    """The mean over seeds."""
    return fmean(what(run) for run in runs.values())


def _loss(run: Run) -> float:
    return run.loss


def _exact(run: Run) -> float:
    return run.exact


def _best_rate(runs: Mapping[str, Mapping[int, Run]], name: str) -> float:
    """The exact answers of a system at the better of its two learning rates."""
    return max(mean(runs[trained], _exact) for trained in _both_rates(name))


def _both_rates(*names: str) -> tuple[str, ...]:
    return (*names, *(f"{name}_slower" for name in names))


def _mola_goal(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    def share(name: str) -> float:
        return mean(runs[name], lambda run: run.parameters) / mean(runs["lora_r64"], lambda run: run.parameters)

    # A quarter of 30 layers is 7 or 8 of them, so that some allocations have a little more than 66 %.
    orders = {name: mean(of, _exact) for name, of in runs.items() if name.startswith("mola")}
    beside, best = _best_rate(runs, "lora_r64"), max((exact for name, exact in orders.items() if share(name) <= 0.66), default=0.0)
    every = ", ".join(f"{name} {exact:.3f} ({share(name):.3f} of the parameters)" for name, exact in orders.items())
    return best >= beside, f"{every}; LoRA r 64 {beside:.3f}"


def _smora_goal(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    got, r8, r64 = (_best_rate(runs, name) for name in ("smora", "lora_r8", "lora_r64"))
    return got >= r8 + 0.02 and got >= r64, f"exact {got:.3f}, LoRA r 8 {r8:.3f}, r 64 {r64:.3f}"


def _smora_loads(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    spreads = [mean(of_rate, lambda run: run.load_spread) for of_rate in runs.values()]
    return max(spreads) <= 0.5, f"coefficient of variation {' and '.join(f'{spread:.2f}' for spread in spreads)}"


def _mos_goal(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    below = sum(runs["mos"][seed].loss < run.loss for seed, run in runs["lora_r2"].items())
    ratio = mean(runs["mos"], _loss) / mean(runs["lora_r16"], _loss)
    return below == len(runs["mos"]) and ratio <= 1.02, f"below r 2 in {below} of {len(runs['mos'])}; {ratio:.3f} of r 16's loss"


def _nola_goal(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    loss = mean(runs["nola"], _loss) / mean(runs["lora_r1_ffn"], _loss)
    sent = mean(runs["lora_r16_ffn"], lambda run: run.bytes_per_step) / mean(runs["nola"], lambda run: run.bytes_per_step)
    return loss <= 1.02 and sent >= 50, f"{loss:.3f} of r 1's loss; r 16 sends {sent:.1f} times its bytes"


def _allora_goal(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    got = mean(runs["allora"], _loss)
    best = min(mean(of, _loss) for name, of in runs.items() if name != "allora")
    return got <= best, f"{got:.4f} beside {best:.4f}"


def _ffa_goal(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    sent = mean(runs["ffa_lora"], lambda run: run.bytes_per_step) / mean(runs["lora_r8"], lambda run: run.bytes_per_step)
    return sent < 0.6, f"{sent:.3f} of the bytes at {mean(runs['ffa_lora'], _loss) / mean(runs['lora_r8'], _loss):.3f} of the loss"


def _llava_goal(runs: Mapping[str, Mapping[int, Run]]) -> tuple[bool, str]:
    got, beside = (_best_rate(runs, name) for name in ("llava_mole", "lora_r8"))
    return got >= beside + 0.01, f"exact {got:.3f} beside {beside:.3f}"


_LORA_R8 = ("lora_r8", "lora_r8_slower", "lora_r8_faster")
GOALS: tuple[Goal, ...] = (
    Goal(
        "llava_mole",
        "exact answers on text: one point over plain LoRA of its active rank, 8",
        LONG,
        _both_rates("llava_mole", "lora_r8"),
        _llava_goal,
    ),
    Goal(
        "mola",
        "best allocation: exact answers of LoRA r 64 at 66 % of its parameters",
        LONG,
        (*MOLA, "mola_2468_slower", *_both_rates("lora_r64")),
        _mola_goal,
    ),
    Goal(
        "smora",
        "exact answers: two points over LoRA r 8, and those of r 64",
        LONG,
        _both_rates("smora", "lora_r8", "lora_r64"),
        _smora_goal,
    ),
    Goal("smora", "even loads: coefficient of variation at most 0.5", LONG, _both_rates("smora"), _smora_loads),
    Goal("mos", "loss below LoRA r 2's, within 2 % of r 16's", SHORT, ("mos", "lora_r2", "lora_r16"), _mos_goal),
    Goal("nola", "1.02 of LoRA r 1's loss at 1/50 of r 16's bytes", SHORT, ("nola", "lora_r1_ffn", "lora_r16_ffn"), _nola_goal),
    Goal("allora", "loss at most that of LoRA at the best of three learning rates", SHORT, ("allora", *_LORA_R8), _allora_goal),
    Goal("ffa_lora", "fewer bytes than plain LoRA", SHORT, ("ffa_lora", "lora_r8"), _ffa_goal),
)
