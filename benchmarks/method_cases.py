"""The systems that `methods` trains beside one another, as settings of `hecate train`, and the goals that they are held to.

Systems of one table train on the same samples in the same order, with one learning rate, but for FFA-LoRA and NOLA. Their recipes and
ALLoRA's are what is trained here; SMoRA's bias moves a hundred times as fast as in its recipe, which is for longer
runs. After 400 steps the systems that have a goal, MoLA with two of its orders, and the LoRA beside which they are set have runs with
half the rate, too (`_slower`). A goal compares the best of a system's runs with the best of its rivals', whatever their rank and rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

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
    plain_lora("lora_r1_ffn_faster", 1, targets=_FFN, learning_rate="1e-2"),
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
    commit: str
    """of the program; of runs before this was noted, the commit that added them to the recording"""

    @property
    def exact(self) -> float:
        """Mean over the tasks of the share of exact answers."""
        return fmean(self.accuracy.values())


Runs = Mapping[tuple[str, int], Mapping[int, Run]]
"""(method, steps) -> seed -> run"""


@dataclass(frozen=True)
class Measure:
    """A figure of a run, and how its mean over seeds is shown."""

    of: Callable[[Run], float]
    digits: int
    """that are shown behind the point"""
    larger_is_better: bool = False

    def mean_and_spread(self, runs: Mapping[int, Run]) -> tuple[float, float]:
        """The mean over seeds and the standard deviation between them; of one seed alone it is 0, for nothing is known of it."""
        values = [self.of(run) for run in runs.values()]
        return fmean(values), stdev(values) if len(values) > 1 else 0.0

    def mean(self, runs: Mapping[int, Run]) -> str:
        return f"{self.mean_and_spread(runs)[0]:.{self.digits}f}"

    def both(self, runs: Mapping[int, Run]) -> str:
        """The mean, and how far seeds lie apart."""
        mean, spread = self.mean_and_spread(runs)
        return f"{mean:.{self.digits}f} ± {spread:.{self.digits}f}" if len(runs) > 1 else f"{mean:.{self.digits}f}"


LOSS = Measure(lambda run: run.loss, 3)
EXACT = Measure(lambda run: 100 * run.exact, 1, larger_is_better=True)
"""in percent"""
MEGABYTES = Measure(lambda run: run.bytes_per_step / 1e6, 2)
"""sent in a step"""
LOAD_SPREAD = Measure(lambda run: run.load_spread, 2)


@dataclass(frozen=True)
class Goal:
    """What a system is to reach beside the best of its rivals: `factor` times what that has, plus `margin`."""

    system: str
    text: str
    steps: int
    measure: Measure
    ours: tuple[str, ...]
    """names of the system's methods, such as its learning rates, of which the best mean counts"""
    rivals: tuple[str, ...] = ()
    """likewise: all ranks and rates of plain LoRA that were tried, so that no badly chosen one counts; (): `margin` is the target"""
    factor: float = 1.0
    margin: float = 0.0

    def verdict(self, runs: Runs) -> str:
        """`met`, `missed`, `not decided by this recording` or `open`, and the figures.

        It is decided if the mean lies on one side of the target by more than the spread over seeds of either side. A method counts if it
        has all seeds; it is open while a rival lacks one.
        """
        complete = {name: of for name in (*self.ours, *self.rivals) if set(of := runs.get((name, self.steps), {})) == set(SEEDS)}
        missing = [name for name in (*self.ours, *self.rivals) if name not in complete]
        if set(missing) & set(self.rivals) or not set(complete) & set(self.ours):
            return f"open: seeds are missing of {', '.join(missing)}"
        ours, got, spread = self._best(complete, self.ours)
        target, figures = self.margin, f"{ours} {self.measure.both(complete[ours])}"
        if self.rivals:
            rival, beside, beside_spread = self._best(complete, self.rivals)
            target, spread = self.factor * beside + self.margin, max(spread, self.factor * beside_spread)
            figures += f", {rival} {self.measure.both(complete[rival])}"
        ahead = got - target if self.measure.larger_is_better else target - got
        found = "met" if ahead > spread else "missed" if -ahead > spread else "not decided by this recording"
        return f"{found}: {figures}" + (f" (seeds are missing of {', '.join(missing)})" if missing else "")

    def _best(self, runs: Mapping[str, Mapping[int, Run]], names: tuple[str, ...]) -> tuple[str, float, float]:
        """The method with the best mean, that mean and its spread."""
        found = [(name, *self.measure.mean_and_spread(runs[name])) for name in names if name in runs]
        return (max if self.measure.larger_is_better else min)(found, key=lambda one: one[1])


_LONG_LORA = ("lora_r8", "lora_r8_slower", "lora_r64", "lora_r64_slower")
_SHORT_LORA = ("lora_r2", "lora_r8", "lora_r8_slower", "lora_r8_faster", "lora_r16", "lora_r64")
_FFN_LORA = ("lora_r1_ffn", "lora_r1_ffn_faster", "lora_r16_ffn")
_BOTH_MOLA = (*MOLA, "mola_2468_slower", "mola_2882_slower")
_BOTH_SMORA = ("smora", "smora_slower")
GOALS: tuple[Goal, ...] = (
    Goal("mixlora", "exact answers of the best LoRA", LONG, EXACT, ("mixlora", "mixlora_slower"), _LONG_LORA),
    Goal(
        "llava_mole",
        "exact answers on text: one point over the best LoRA",
        LONG,
        EXACT,
        ("llava_mole", "llava_mole_slower"),
        _LONG_LORA,
        margin=1.0,
    ),
    Goal("mola", "exact answers of the best LoRA", LONG, EXACT, _BOTH_MOLA, _LONG_LORA),
    Goal("smora", "exact answers: two points over the best LoRA", LONG, EXACT, _BOTH_SMORA, _LONG_LORA, margin=2.0),
    Goal("smora", "even loads: coefficient of variation at most 0.5", LONG, LOAD_SPREAD, _BOTH_SMORA, margin=0.5),
    Goal("mos", "loss below that of LoRA r 2, which has as many parameters", SHORT, LOSS, ("mos",), ("lora_r2",)),
    Goal("mos", "loss within 2 % of the best LoRA's", SHORT, LOSS, ("mos",), _SHORT_LORA, factor=1.02),
    Goal("nola", "loss within 2 % of the best LoRA's on FFNs", SHORT, LOSS, ("nola",), _FFN_LORA, factor=1.02),
    Goal("nola", "1/50 of the bytes of LoRA r 16", SHORT, MEGABYTES, ("nola",), ("lora_r16_ffn",), factor=1 / 50),
    Goal("allora", "loss at most that of the best LoRA", SHORT, LOSS, ("allora",), _SHORT_LORA),
    Goal("ffa_lora", "0.6 of the bytes of LoRA of its rank", SHORT, MEGABYTES, ("ffa_lora",), ("lora_r8",), factor=0.6),
    Goal(
        "ffa_lora",
        "loss within 2 % of LoRA's of its rank",
        SHORT,
        LOSS,
        ("ffa_lora",),
        ("lora_r8", "lora_r8_slower", "lora_r8_faster"),
        factor=1.02,
    ),
)
