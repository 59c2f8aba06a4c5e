"""The base model of a run: a causal language model with its head and its tokenizer, as training and export take it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from hecate.kernels.backend import Backend
from hecate.model.causal_head import CausalHead, LanguageModelHead
from hecate.model.files.gguf_files import one_gguf_reader, refuse_unknown_architecture
from hecate.model.files.load import base_of, load_model, load_tokenizer, outline_of, pick_dtype, read_config, resolve_model
from hecate.model.files.load_moe import OwnExperts, find_own_experts, load_moe_model
from hecate.model.files.model_digest import model_digest
from hecate.model.files.safetensors_headers import stored_tensors
from hecate.model.files.stored_experts import refuse_experts
from hecate.model.gated_ffn import GatedFfn, find_gated_ffns
from hecate.model.insert import FoundUnit
from hecate.model.layers.attention import AUTO, AttentionChoice, pick_way
from hecate.model.linears import FoundLinear, find_linears
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.expert_kinds import ExpertKind
from hecate.ranks.ranks import Ranks


@dataclass(frozen=True)
class BaseChoice:
    """The base model that something trained is used with, and how it computes."""

    name: str | None = None
    """The base model's name or path; None: the one that what was trained names."""
    dtype: str = "auto"
    num_hidden_layers: int | None = None
    """The number of first layers to keep; None: all."""
    attention: AttentionChoice = AUTO
    kernels: Backend = "auto"

    def name_for(self, trained: Path, named: str) -> str:
        """The base model's name for something trained that names `named`. Raises UserError: that is not there, and no other is chosen."""
        if self.name is not None:
            return self.name
        base_of(trained, named)
        return named


@dataclass(frozen=True)
class BaseModel:
    """A causal language model: a checkpoint as it was loaded, or what another front end has built (`hecate.model.front_ends`)."""

    model: nn.Module
    head: CausalHead
    tokenizer: Any
    vocab_size: int
    ffns: tuple[GatedFfn, ...] = field(default=(), kw_only=True)
    """The FFNs of a dense model, found once, when it was loaded."""
    linears: tuple[FoundLinear, ...] = field(default=(), kw_only=True)
    """The linears of a dense model's decoder layers, for experts over linears; `ffns` is then empty."""
    own_experts: tuple[OwnExperts, ...] = field(default=(), kw_only=True)
    """The experts of an MoE model, which were left out when it was loaded."""
    moe: MoeModel | None = field(default=None, kw_only=True)
    """The model with its experts, if its front end has put them in; None: they are put in where units were found."""
    digest: str = field(default="", kw_only=True)
    """The digest of the model before training (`hecate.model.files.model_digest`); empty for a model that nobody trains."""
    chat_template: str = field(default="", kw_only=True)
    """The chat template that the tokenizer has in place of its own; empty: its own."""

    def with_chat_template(self, text: str) -> Self:
        """Return the model with another chat template, which its tokenizer, the same as before, has from now on."""
        self.tokenizer.chat_template = text
        return replace(self, chat_template=text)

    @property
    def found(self) -> tuple[FoundUnit, ...]:
        """The places where experts may be put."""
        return self.own_experts or self.linears or self.ffns

    def rejoin(self, _ranks: Ranks) -> None:
        """Go on with other ranks, in other process groups. Nothing of a model that every rank has for itself depends on them."""


def check_base(name_or_path: str, num_hidden_layers: int | None, kind: ExpertKind) -> None:
    """Check that experts can be added to a model or trained in it, by its configuration and its files' headers; no weights are read.

    Of a GGUF file only the architecture's name is checked: reading its configuration takes as long as the check spares.

    Raises:
        UserError: they cannot.
    """
    source = resolve_model(name_or_path)
    if kind.of_moe_base:
        find_own_experts(source, kind, num_hidden_layers)
    elif source.gguf_file is None:
        _places(outline_of(read_config(source, num_hidden_layers), source), kind)
    else:
        refuse_unknown_architecture(source.folder / source.gguf_file)


def _places(model: nn.Module, kind: ExpertKind) -> tuple[tuple[GatedFfn, ...], tuple[FoundLinear, ...]]:
    """The FFNs or the linears of a dense model that get experts of this kind."""
    return ((), tuple(find_linears(model))) if kind.over_linears else (tuple(find_gated_ffns(model)), ())


def build_base(
    name_or_path: str,
    dtype: str,
    num_hidden_layers: int | None,
    device: torch.device,
    kind: ExpertKind,
    attention: AttentionChoice = AUTO,
    *,
    experts_stay: bool = False,
) -> BaseModel:
    """Load model and tokenizer. The model stays in eval mode: dropout of a frozen base would only be noise that depends on ranks.

    Args:
        experts_stay: a model with experts of its own will do for experts over linears, too. It is loaded whole, and its experts stay as
            they are.

    Raises:
        UserError: the model cannot be read, or has experts of its own where this kind of experts needs a model without, or the reverse; or
            attention cannot be computed as asked.
    """
    source = resolve_model(name_or_path)
    ffns: tuple[GatedFfn, ...] = ()
    linears: tuple[FoundLinear, ...] = ()
    own_experts: tuple[OwnExperts, ...] = ()
    model: Any
    with one_gguf_reader(source.gguf_file):
        if kind.of_moe_base:
            model, own_experts = load_moe_model(source, pick_dtype(dtype, device), device, kind, num_hidden_layers)
        else:
            if source.gguf_file is None and not experts_stay:
                refuse_experts(stored_tensors(source.folder), source.folder, kind)
            model = load_model(source, pick_dtype(dtype, device), device, num_hidden_layers)
            if source.gguf_file is not None and not experts_stay:  # its tensors have names of their own, so the loaded model is asked
                refuse_experts(model.state_dict(), source.folder / source.gguf_file, kind)
            ffns, linears = _places(model, kind)
        model.eval()
        tokenizer = load_tokenizer(source)
    vocab_size = model.get_input_embeddings().num_embeddings
    digest = model_digest(source)
    head = LanguageModelHead(model, pick_way(attention, model))
    return BaseModel(model, head, tokenizer, vocab_size, ffns=ffns, linears=linears, own_experts=own_experts, digest=digest)
