"""Using what a run has left, an adapter or a whole model: evaluation and answers, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hecate.adapters.model_folder import is_model_folder
from hecate.adapters.peft_by_source import sources_in, with_lora_adapters
from hecate.config import Config
from hecate.data.prompts import asked
from hecate.data.user_features import UserFeatures, read_user_features, users_of
from hecate.errors import UserError
from hecate.model.attention import AttentionChoice
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import join_ranks
from hecate.report.summary import print_summary
from hecate.train.answers import answers_to
from hecate.train.build import encode_sources, on_device
from hecate.train.checkpointed import is_checkpoint
from hecate.train.evaluate import evaluate
from hecate.train.generation import Decoding
from hecate.train.opened import Opened, load_trained, open_trained, require_users
from hecate.train.trained import find_trained


def evaluate_trained(config: Config, trained: Path) -> None:
    """Print held-out loss and, with eval.generate, exact accuracy of each source of data.eval.

    Raises:
        UserError: no data.eval, no such folder, the adapter does not fit the model, or there is no room for the model.
    """
    if not config.data.eval:
        raise UserError("hecate eval: data.eval is empty; name at least one file to evaluate on")
    trained = find_trained(trained)
    with join_ranks() as ranks:
        named, attention = config.model, AttentionChoice(config.model.attention, config.data.packing)
        choice = BaseChoice(named.name_or_path, named.dtype, named.num_hidden_layers, attention, config.kernels)
        if config.moe.by_source and sources_in(trained):
            base, moe = with_lora_adapters([trained / source.name for source in config.data.train], ranks, choice)
        else:
            base, moe = load_trained(trained, ranks, choice)
        users = users_of(config)
        require_users(trained, moe, users)
        sources = encode_sources(config.data.eval, config, base, ranks, users)
        found = evaluate(config, ranks, base, moe, sources, None if users is None else on_device(users, ranks))
        if ranks.is_first:
            print_summary(None, found.scores, [(_what(trained), str(trained))])


@contextmanager
def answering(trained: Path, *, model: str | None = None, user: str | None = None, features: Path | None = None) -> Iterator[Opened]:
    """Open what was trained, for answers.

    Args:
        model: the base model, in place of the one that was trained on.
        user: the id of the user who asks, for adapters that decide by users; None: each prompt says it.
        features: the file with the users' features.

    Raises:
        UserError: as `open_trained`; or the user has no features, or none were given.
    """
    users = _asking(user, features)
    with join_ranks() as ranks:
        yield open_trained(trained, ranks, BaseChoice(model), users)


def answer(
    trained: Path,
    prompt: str,
    *,
    system: str | None,
    model: str | None,
    max_new_tokens: int,
    user: str | None = None,
    features: Path | None = None,
) -> str:
    """The greedy answer to one prompt in the tokenizer's chat template; a model without one goes on with the prompt as plain text.

    Raises:
        UserError: as `answering`; or there is a system message and no chat template.
    """
    if features is not None and user is None:
        raise UserError("--features was given without --user ID; an adapter that decides by users needs both")
    with answering(trained, model=model, user=user, features=features) as opened:
        prompts = iter([asked(prompt, system, user)])
        ((_, (found,)),) = answers_to(opened, prompts, Decoding(max_new_tokens), batch_size=1)
        return found.text


def _asking(user: str | None, features: Path | None) -> UserFeatures | None:
    """The features among which those of the user are; None: none are given. Raises UserError: a user is given without them."""
    if features is None:
        if user is not None:
            raise UserError("--user was given without --features FILE.npz; an adapter that decides by users needs both")
        return None
    found = read_user_features(features)
    if user is not None:
        found.row(user)
    return found


def _what(trained: Path) -> str:
    return "checkpoint" if is_checkpoint(trained) else "model" if is_model_folder(trained) else "adapter"
