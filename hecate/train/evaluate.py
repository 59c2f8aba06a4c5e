"""Held-out loss, exact accuracy and expert loads of each evaluation source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hecate.config import Config
from hecate.data.batches import Batch, collate
from hecate.data.encode import IGNORED
from hecate.data.evaluation import GenerationItem, eval_sequences, generation_items, share_of_rank
from hecate.data.sequences import PackedSequence
from hecate.data.sources import TokenSource
from hecate.engine.protocol import EvaluationPasses
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_users import PassUsers, users_of_rows
from hecate.experts.routers.router import RouterStats
from hecate.model.base import BaseModel
from hecate.model.moe_model import MoeModel
from hecate.parallel.comm.device_tables import copy_to
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks
from hecate.report.events import EvalScore, Evaluation, ShownAnswer
from hecate.train.extensions.users import with_users
from hecate.train.first_answers import first_answers
from hecate.train.generation import Decoding, generate
from hecate.train.steps.passes import forward_loss, pass_tokens

Heard = Callable[[str, Sequence[GenerationItem], Sequence[str]], None]
"""A function that gets a source's name, the prompts of this rank, and the answers to them."""
Recorded = Callable[[Sequence[PackedSequence], Mapping[Unit, RouterStats]], None]
"""A function that gets the rows of a pass, and what the routers have done in it."""


def evaluate(
    config: Config,
    ranks: Ranks,
    base: BaseModel,
    moe: MoeModel,
    sources: Sequence[TokenSource],
    features_UF: Tensor | None = None,
    heard: Heard | None = None,
    recorded: Recorded | None = None,
) -> Evaluation:
    """Evaluate all sources. Every rank must call it; rows and prompts are shared out.

    Experts are everywhere meanwhile, unless they stay with their owners (`Engine.runs_in_lockstep`): ranks then go forward together.

    Args:
        sources: those of `config.data.evaluated`, in that order.
        features_UF: the vectors of all users, [users, width], on the model's device; None: no router decides by users.
        heard: called with the answers that were counted, if any were.
        recorded: called with what this rank's routers have done.
    """
    losses, loads = {}, {}
    with moe.engine.evaluation(in_lockstep=moe.engine.runs_in_lockstep) as evaluation, torch.no_grad():
        for index, source in enumerate(sources):
            rows = eval_sequences(
                sources, index, seq_len=config.data.seq_len, packing=config.data.packing, max_samples=config.eval.max_samples
            )
            tokens_of = partial(_tokens_of, base, _expert_of(config, source.name, ranks.device), features_UF)
            losses[source.name], loads[source.name] = _loss_and_loads(config, ranks, base, moe, evaluation, rows, tokens_of, recorded)
        asks = config.eval.generate
        exact, shown = _exact(config, ranks, base, moe, evaluation, sources, features_UF, heard) if asks else ({}, {})
    most = config.eval.max_samples
    scores = {
        source.name: EvalScore(
            loss=losses[source.name],
            accuracy=exact.get(source.name),
            samples=len(source) if most is None else min(len(source), most),
        )
        for source in sources
    }
    return Evaluation(scores, loads, shown)


def _tokens_of(base: BaseModel, expert: Tensor | None, features_UF: Tensor | None, batch: Batch) -> PassTokens:
    """What layers see of a batch. `expert`: int64 [1]: the one that serves all of its tokens; None: experts are chosen."""
    tokens = replace(pass_tokens(base.head, batch), source=expert)
    return tokens if features_UF is None else with_users(tokens, base.head, batch, features_UF)


def _loss_and_loads(
    config: Config,
    ranks: Ranks,
    base: BaseModel,
    moe: MoeModel,
    evaluation: EvaluationPasses,
    rows: Sequence[PackedSequence],
    tokens_of: Callable[[Batch], PassTokens],
    recorded: Recorded | None,
) -> tuple[float, dict[Unit, list[int]]]:
    """The mean loss of a source's label tokens, and how many tokens each expert of each layer has had of them."""
    totals = torch.zeros(2, dtype=torch.float64)
    counts = {layer: torch.zeros(moe.engine.shards.families[layer].num_experts, dtype=torch.int64) for layer in moe.layers}
    seq_len = config.data.seq_len
    padding = {"parts": ranks.tp_size, "multiple": base.head.row_multiple(seq_len)}
    for share in share_of_rank(rows, ranks.dp_rank, ranks.dp_size, config.micro_batch_size):
        if not moe.engine.runs_in_lockstep and all(len(row.input_ids) == 0 for row in share):
            continue  # nothing to share: no collective runs while every expert is everywhere
        batch = collate(share, pad_id=0, seq_len=seq_len, **padding).to(ranks.device)
        with evaluation.forward(tokens_of(batch)) as routed:
            totals[0] += forward_loss(base.head, batch).cpu()
        totals[1] += (batch.targets != IGNORED).sum().cpu() * ranks.is_first_of_tensor_group
        if recorded is not None:
            recorded(share, routed)
        for layer, stats in routed.items():
            counts[layer] += stats.count_KE.sum(0).cpu()
    loss_sum, labels = ranks.all_sum(totals).tolist()
    layers = sorted(counts)
    flat = ranks.all_sum(torch.cat([counts[layer] for layer in layers])) if layers else torch.zeros(0)
    parts = flat.split([len(counts[layer]) for layer in layers])
    return loss_sum / max(labels, 1), {layer: part.tolist() for layer, part in zip(layers, parts, strict=True)}


def _expert_of(config: Config, source: str, device: torch.device) -> Tensor | None:
    """int64 [1]: the number of a source in the training data, where it is the expert; None where experts are chosen otherwise."""
    if not config.moe.by_source:
        return None
    return copy_to(torch.tensor([[named.name for named in config.data.train].index(source)]), device)


def _exact(
    config: Config,
    ranks: Ranks,
    base: BaseModel,
    moe: MoeModel,
    evaluation: EvaluationPasses,
    sources: Sequence[TokenSource],
    features_UF: Tensor | None,
    heard: Heard | None,
) -> tuple[dict[str, float], dict[str, tuple[ShownAnswer, ...]]]:
    """The share of exact answers of each source that has questions, and the first of its answers.

    Questions of all sources are answered together, by length, since a forward pass over few rows takes nearly as long as one over many;
    those of sources that are experts by themselves are not.
    """
    questions = {
        source.name: generation_items(source, named, base.tokenizer, config.eval.max_samples)
        for source, named in zip(sources, config.data.evaluated, strict=True)
    }
    shares: dict[str, float] = {}
    shown: dict[str, tuple[ShownAnswer, ...]] = {}
    for names in [[name] for name in questions] if config.moe.by_source else [list(questions)]:
        tokens = PassTokens(source=_expert_of(config, names[0], ranks.device)) if names else PassTokens()

        def begin(batch: Sequence[GenerationItem], tokens: PassTokens = tokens) -> AbstractContextManager[object]:
            return evaluation.forward(replace(tokens, users=_users_of(batch, features_UF)))

        asked = [(name, item) for name in names for item in questions[name]]
        mine = asked[ranks.rank :: ranks.world_size]
        answers = _answers(config, ranks, base, [item for _, item in asked], moe.engine.runs_in_lockstep, begin)
        shown |= first_answers(ranks, base.tokenizer, asked, answers)
        for name in names:
            said = [(item, answer) for (of, item), answer in zip(mine, answers, strict=True) if of == name]
            exact = sum(answer == item.answer_text for item, answer in said)
            right = ranks.all_sum(torch.tensor([float(exact)])).item()
            if questions[name]:
                shares[name] = right / len(questions[name])
            if heard is not None:
                heard(name, [item for item, _ in said], [answer for _, answer in said])
    return shares, shown


def _answers(
    config: Config,
    ranks: Ranks,
    base: BaseModel,
    items: Sequence[GenerationItem],
    in_lockstep: bool,
    begin: Callable[[Sequence[GenerationItem]], AbstractContextManager[object]],
) -> list[str]:
    """The greedy answers to the prompts of this rank, items[rank :: world size], without what the chat template writes around an answer.

    Args:
        begin: begins the forward passes of a batch, whose rows are these prompts.
    """
    mine = items[ranks.rank :: ranks.world_size]
    asked = list(mine)
    # As many prompts as on other ranks: each forward pass has collectives. The answer to the last one is thrown away.
    if in_lockstep and items:
        asked += [items[0]] * (-(-len(items) // ranks.world_size) - len(mine))
    answers = generate(
        base,
        [item.prompt_ids for item in asked],
        Decoding(config.eval.max_new_tokens, chat=True),
        batch_size=config.eval.batch_size,
        begin=lambda chosen: begin([asked[i] for i in chosen]),
        in_lockstep=in_lockstep,
    )
    return [item.content_of(answer.text) for item, answer in zip(mine, answers[: len(mine)], strict=True)]


def _users_of(items: Sequence[GenerationItem], features_UF: Tensor | None) -> PassUsers | None:
    """The users of a batch of prompts; None: no router decides by users."""
    if features_UF is None:
        return None
    return users_of_rows(features_UF, copy_to(torch.tensor([item.user for item in items]), features_UF.device))
