"""Using what a run has left, an adapter or a whole model: evaluation and answers, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from hecate.adapters import AdapterConfig, load_adapter
from hecate.adapters.bake_user import require_width
from hecate.adapters.export import load_into, require_fit
from hecate.adapters.linear_experts import with_linear_adapter
from hecate.adapters.linear_format import is_linear_adapter
from hecate.adapters.lora_folder import is_lora_adapter
from hecate.adapters.model_folder import is_model_folder, load_model_folder
from hecate.adapters.peft_by_source import refuse_several, sources_in, with_lora_adapters
from hecate.adapters.peft_experts import with_peft_adapter
from hecate.adapters.peft_moe import is_peft_adapter
from hecate.config import Config, RouterConfig
from hecate.data.user_features import UserFeatures, read_user_features, users_of
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_users import users_of_rows
from hecate.kernels.backend import Backend
from hecate.model.attention import AttentionChoice
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.gated_ffn import decoder_layers
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.parallel.expert_kinds import LoraShape, kind_written_as
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import local_topology
from hecate.ranks.ranks import Ranks, join_ranks
from hecate.report.summary import print_summary
from hecate.train.build import encode_sources, on_device
from hecate.train.checkpointed import is_checkpoint, model_of_checkpoint
from hecate.train.evaluate import evaluate, generate
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
            base, moe = _trained(trained, ranks, choice)
        users = users_of(config)
        _require_users(trained, moe, users)
        sources = encode_sources(config.data.eval, config, base, ranks, users)
        found = evaluate(config, ranks, base, moe, sources, None if users is None else on_device(users, ranks))
        if ranks.is_first:
            print_summary(None, found.scores, [(_what(trained), str(trained))])


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

    Args:
        user: the id of the user who asks, for adapters that decide by users.
        features: the file with that user's features.

    Raises:
        UserError: as `evaluate_trained`; or there is a system message and no chat template; or a user is missing, superfluous or unknown.
    """
    users = _asking(user, features)
    trained = find_trained(trained)
    from hecate.data.chat import render_prompt, require_chat_template

    with join_ranks() as ranks:
        base, moe = _trained(trained, ranks, BaseChoice(model))
        _require_users(trained, moe, users)
        text = prompt
        if system is not None or base.tokenizer.chat_template or not is_model_folder(trained):
            require_chat_template(base.tokenizer, str(trained))
            messages = [{"role": "system", "content": system}] if system is not None else []
            text = render_prompt(base.tokenizer, [*messages, {"role": "user", "content": prompt}])
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = PassTokens()
        if users is not None and user is not None:
            tokens = PassTokens(users=users_of_rows(on_device(users, ranks), torch.tensor([users.row(user)], device=ranks.device)))
        with moe.engine.evaluation() as evaluation, evaluation.forward(tokens):
            return generate(base, [ids], max_new_tokens=max_new_tokens, batch_size=1)[0]


def _asking(user: str | None, features: Path | None) -> UserFeatures | None:
    """The features among which those of the user are; None: no user is given. Raises UserError: one is given without the other."""
    if (user is None) != (features is None):
        missing, other = ("--features FILE.npz", "--user") if features is None else ("--user ID", "--features")
        raise UserError(f"{other} was given without {missing}; an adapter that decides by users needs both")
    if user is None or features is None:
        return None
    found = read_user_features(features)
    found.row(user)
    return found


def _require_users(trained: Path, moe: MoeModel, users: UserFeatures | None) -> None:
    """Raises UserError: the routers decide by users and there are none, or the other way around, or their widths differ."""
    if users is None and moe.user_width is not None:
        raise UserError(
            f"{trained}: its experts are mixed by the user, so that the user's features are needed\n"
            "  generate: give --user ID and --features FILE.npz; eval: the configuration of the training has data.features"
        )
    if users is not None and moe.user_width is None:
        raise UserError(f"{trained}: nothing in it depends on the user\n  leave the features out, and moe.router.input=user")
    if users is not None and moe.user_width is not None:
        require_width(f"{trained}", moe.user_width, users.width)


def _trained(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    if is_checkpoint(folder):
        return model_of_checkpoint(folder, ranks, choice)[1:]
    if is_model_folder(folder):
        return load_model_folder(folder, ranks, choice.dtype, choice.attention)
    return _with_adapter(folder, ranks, choice)


def _with_adapter(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    refuse_several(folder)
    if is_lora_adapter(folder):
        return with_lora_adapters([folder], ranks, choice)
    if is_peft_adapter(folder):
        return with_peft_adapter(folder, ranks, choice)
    if is_linear_adapter(folder):
        return with_linear_adapter(folder, ranks, choice)
    tensors, description = load_adapter(folder)
    try:
        router = description.router
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    name, kind = choice.name_for(folder, description.base_model_name_or_path), kind_written_as("mixlora")
    base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, kind, choice.attention)
    num_layers = len(decoder_layers(base.model)[1])
    if num_layers != description.num_layers:
        raise UserError(f"{folder}: made for {description.num_layers} layers, but the base model has {num_layers}")
    planner = EngineConfig(POLICIES["full"], local_topology(ranks.world_size, cuda=ranks.device.type == "cuda"))
    moe = insert_experts(base.model, base.found, _plan(description, router, choice.kernels), planner, ranks.groups)
    require_fit(moe, base, tensors, folder)
    load_into(moe, tensors)
    return base, moe


def _what(trained: Path) -> str:
    return "checkpoint" if is_checkpoint(trained) else "model" if is_model_folder(trained) else "adapter"


def _plan(description: AdapterConfig, router: RouterConfig, kernels: Backend) -> InsertionPlan:
    lora = LoraShape(description.r, description.scale, 0.0)
    return InsertionPlan(
        kind=kind_written_as("mixlora"),
        experts_per_layer=description.experts_per_layer,
        top_k=max(description.experts_per_layer) if router.takes_all else description.top_k,
        router=router,
        lora=lora,
        target_modules=description.target_modules,
        seed=0,
        kernels=kernels,
    )
