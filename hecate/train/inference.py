"""Using what a run has left, an adapter or a whole model: evaluation and answers, in one process."""

from __future__ import annotations

from pathlib import Path

from hecate.adapters import AdapterConfig, load_adapter
from hecate.adapters.export import load_into
from hecate.adapters.linear_experts import with_linear_adapter
from hecate.adapters.linear_format import is_linear_adapter
from hecate.adapters.model_folder import is_model_folder, load_model_folder
from hecate.adapters.peft_by_source import is_lora_adapter, sources_in, with_lora_adapters
from hecate.adapters.peft_experts import with_peft_adapter
from hecate.adapters.peft_moe import is_peft_adapter
from hecate.config import Config, RouterConfig
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
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
from hecate.train.build import encode_sources
from hecate.train.evaluate import evaluate, generate


def evaluate_trained(config: Config, trained: Path) -> None:
    """Print held-out loss and, with eval.generate, exact accuracy of each source of data.eval.

    Raises:
        UserError: no data.eval, no such folder, the adapter does not fit the model, or there is no room for the model.
    """
    if not config.data.eval:
        raise UserError("hecate eval: data.eval is empty; name at least one file to evaluate on")
    with join_ranks() as ranks:
        named, attention = config.model, AttentionChoice(config.model.attention, config.data.packing)
        choice = BaseChoice(named.name_or_path, named.dtype, named.num_hidden_layers, attention, config.kernels)
        if config.moe.by_source and sources_in(trained):
            base, moe = with_lora_adapters([trained / source.name for source in config.data.train], ranks, choice)
        else:
            base, moe = _trained(trained, ranks, choice)
        sources = encode_sources(config.data.eval, config, base, ranks)
        found = evaluate(config, ranks, base, moe, sources)
        if ranks.is_first:
            print_summary(None, found.scores, [("model" if is_model_folder(trained) else "adapter", str(trained))])


def answer(trained: Path, prompt: str, *, system: str | None, model: str | None, max_new_tokens: int) -> str:
    """The greedy answer to one prompt in the tokenizer's chat template; a model without one goes on with the prompt as plain text.

    Raises:
        UserError: as `evaluate_trained`; or there is a system message and no chat template.
    """
    from hecate.data.chat import render_prompt, require_chat_template

    with join_ranks() as ranks:
        base, moe = _trained(trained, ranks, BaseChoice(model))
        text = prompt
        if system is not None or base.tokenizer.chat_template or not is_model_folder(trained):
            require_chat_template(base.tokenizer, str(trained))
            messages = [{"role": "system", "content": system}] if system is not None else []
            text = render_prompt(base.tokenizer, [*messages, {"role": "user", "content": prompt}])
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        with moe.engine.evaluation():
            return generate(base, [ids], max_new_tokens=max_new_tokens, batch_size=1)[0]


def _trained(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    if is_model_folder(folder):
        return load_model_folder(folder, ranks, choice.dtype, choice.attention)
    return _with_adapter(folder, ranks, choice)


def _with_adapter(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    if sources := sources_in(folder):
        raise UserError(f"{folder}: holds the adapters of several sources: {', '.join(sources)}\n  name one: {folder / sources[0]}")
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
    name, kind = choice.name or description.base_model_name_or_path, kind_written_as("mixlora")
    base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, kind, choice.attention)
    num_layers = len(decoder_layers(base.model)[1])
    if num_layers != description.num_layers:
        raise UserError(f"{folder}: made for {description.num_layers} layers, but the base model has {num_layers}")
    planner = EngineConfig(POLICIES["full"], local_topology(ranks.world_size, cuda=ranks.device.type == "cuda"))
    moe = insert_experts(base.model, base.found, _plan(description, router, choice.kernels), planner, ranks.groups)
    for name, wanted in _shapes(moe).items():
        if tuple(tensors[name].shape) != wanted:
            raise UserError(f"{folder}: {name} has shape {tuple(tensors[name].shape)}, but the base model needs {wanted}")
    load_into(moe, tensors)
    return base, moe


def _shapes(moe: MoeModel) -> dict[str, tuple[int, ...]]:
    """One tensor of each size that depends on the base model."""
    from hecate.adapters import router_tensor_name

    return {router_tensor_name(unit.layer): tuple(router.shape) for unit, router in moe.routers.items()}


def _plan(description: AdapterConfig, router: RouterConfig, kernels: Backend) -> InsertionPlan:
    lora = LoraShape(description.r, description.scale, 0.0)
    return InsertionPlan(
        kind=kind_written_as("mixlora"),
        experts_per_layer=description.experts_per_layer,
        top_k=max(description.experts_per_layer) if router.dense else description.top_k,
        router=router,
        lora=lora,
        target_modules=description.target_modules,
        seed=0,
        kernels=kernels,
    )
