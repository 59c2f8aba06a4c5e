"""Adapter folders as sets of terms and back, and mixtures with fewer experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor

from hecate.adapters.folder import save_adapter
from hecate.adapters.formats.linears import LinearsDescription, pair_names, router_name
from hecate.adapters.mixlora.description import MixLoraDescription
from hecate.adapters.places import expert_a, expert_b
from hecate.adapters.sets.adapter_set import EXACT, AdapterSet, Merged
from hecate.adapters.sets.fewer_experts import fewer_experts
from hecate.adapters.sets.lego import lego
from hecate.adapters.sets.set_files import read_set, write_set
from hecate.adapters.sets.sums import stack
from hecate.config import RouterConfig
from hecate.errors import UserError
from tests.hecate.adapters.exporting import (
    EXPERTS,
    LIMIT,
    RANK,
    damaged,
    export,
    hecate_logits,
    mixlora_description,
    mixlora_tensors,
    save_dense,
    save_mixlora,
    save_moe,
    save_peft,
)
from tests.hecate.adapters.making_sets import pair_of
from tests.hecate.model.tiny import SIZES

LAYERS, HIDDEN = SIZES["num_hidden_layers"], SIZES["hidden_size"]


def save_experts_over_linears(folder: Path, model: Path, experts: int = 3, seed: int = 0, **changes: Any) -> Path:
    random = torch.Generator().manual_seed(seed)
    outputs = SIZES["num_attention_heads"] * SIZES["head_dim"]
    values: dict[str, Any] = {"r": 2, "alpha": 3, "top_k": 2, "router": RouterConfig(), **changes}
    tensors = {}
    for path in [f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]:
        tensors[router_name(path)] = torch.randn(experts, HIDDEN, generator=random)
        for expert in range(experts):
            name_a, name_b = pair_names(path, expert)
            tensors[name_a] = 0.3 * torch.randn(values["r"], HIDDEN, generator=random)
            tensors[name_b] = 0.3 * torch.randn(outputs, values["r"], generator=random)
    config = LinearsDescription(
        base_model_name_or_path=str(model),
        use_rslora=False,
        target_modules=("q_proj",),
        experts_per_layer=(experts,) * LAYERS,
        dropout=0.0,
        router_aux_loss_coef=0.0,
        **values,
    )
    save_adapter(folder, tensors, config)
    return folder


def _linears(folder: Path) -> Path:
    return save_peft(folder / "adapter", save_dense("llama", folder / "model"), ["q_proj", "down_proj"], experts=False)[0]


FORMS: dict[str, Callable[[Path], Path]] = {
    "peft": _linears,
    "peft experts": lambda folder: save_peft(folder / "adapter", save_moe("qwen3_moe", folder / "model"), ["q_proj"])[0],
    "per expert": lambda folder: export(FORMS["peft experts"](folder), "per-expert", folder / "split"),
    "mixlora": lambda folder: save_mixlora(folder / "adapter", save_dense("llama", folder / "model")),
    "linears": lambda folder: save_experts_over_linears(folder / "adapter", save_dense("llama", folder / "model")),
}


def as_it_is(one: AdapterSet) -> Merged:
    return Merged(one, lambda module: [one.read(module)])


@pytest.mark.parametrize("form", FORMS)
def test_a_set_is_written_as_it_was_read(tmp_path: Path, form: str) -> None:
    """Bit for bit in float32; and two halves, stacked, compute what the whole does."""
    folder = FORMS[form](tmp_path)
    one = read_set(folder)
    assert one.base_digest is not None
    told: list[tuple[int, int]] = []
    written = write_set(as_it_is(one), tmp_path / "again", lambda done, of, module: told.append((done, of)))
    assert told == [(done, len(one.sizes)) for done in range(len(one.sizes))]
    assert max(written.errors.values()) < EXACT
    assert written.num_bytes == (tmp_path / "again/adapter_model.safetensors").stat().st_size
    if form != "per expert":
        before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "again"))
        assert before.keys() == after.keys()
        for name, tensor in before.items():  # what is multiplied by the scale and divided by it again, is rounded in the type of the file
            torch.testing.assert_close(after[name], tensor, rtol=0 if tensor.dtype == torch.float32 else 4e-16, atol=0)
    merged = stack([one, one], [0.5, 0.5])
    write_set(merged, tmp_path / "halves")
    again = read_set(tmp_path / "halves")
    assert (again.rank, again.description.alpha, again.scale) == (2 * one.rank, 2 * one.rank, 1.0)
    assert again.sizes == one.sizes
    assert again.description.extra["merged"] == {
        "method": "stack",
        "of": [str(folder)] * 2,
        "weights": [0.5, 0.5],
        "relative_error": pytest.approx(0.0, abs=EXACT),
    }
    torch.testing.assert_close(hecate_logits(tmp_path / "halves"), hecate_logits(folder), **LIMIT)


def test_an_expert_of_a_fused_tensor_is_found(tmp_path: Path) -> None:
    folder = FORMS["peft experts"](tmp_path)
    one, tensors = read_set(folder), load_file(folder / "adapter_model.safetensors")
    begin = "base_model.model.model.layers.1.mlp.experts"
    for projection, name in (("gate_up_proj", f"{begin}.base_layer"), ("down_proj", begin)):
        joined_a, joined_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        experts = len(joined_a) // RANK
        for expert in range(experts):
            a, b = pair_of(one, f"model.layers.1.mlp.experts.{projection}.{expert}")
            assert torch.equal(a, expert_a(joined_a, expert, experts))
            torch.testing.assert_close(b, 6 / RANK * expert_b(joined_b, expert, experts))


def test_a_shrunk_adapter_is_smaller_and_is_read(tmp_path: Path) -> None:
    folder = FORMS["peft experts"](tmp_path)
    written = write_set(lego([read_set(folder)], [1.0], rank=1), tmp_path / "small")
    assert 0 < max(written.errors.values()) < 2
    assert written.num_bytes < 0.4 * (folder / "adapter_model.safetensors").stat().st_size
    assert hecate_logits(tmp_path / "small").isfinite().all()
    value = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert value["hecate"]["extra"]["merged"]["rank"] == value["r"] == value["lora_alpha"] == 1


def save_doubled(folder: Path, model: Path) -> tuple[Path, MixLoraDescription, dict[str, Tensor]]:
    """A mixture of six experts, of which 3, 4 and 5 are 1, 2 and 0 once more, with routers' rows of their own; and the one of three."""
    config, three = mixlora_description(model), mixlora_tensors(mixlora_description(model))
    of = [0, 1, 2, 1, 2, 0]
    assert EXPERTS == 3
    tensors = {}
    for name, tensor in three.items():
        if "moe_gate" in name:
            tensors[name] = torch.cat([tensor, 0.1 + tensor[of[3:]]])
        elif ".experts." in name:
            begin, _, rest = name.partition(".experts.")
            tensors |= {f"{begin}.experts.{new}.{rest[2:]}": tensor.clone() for new, old in enumerate(of) if rest[0] == str(old)}
        else:
            tensors[name] = tensor
    save_adapter(folder, tensors, replace(config, num_experts=6))
    return folder, config, three


def test_equal_experts_of_a_mixture_become_one(tmp_path: Path) -> None:
    folder, config, three = save_doubled(tmp_path / "six", save_dense("llama", tmp_path / "model"))
    merged = fewer_experts(read_set(folder), 3)
    assert max(merged.errors().values()) < 1e-7  # the file has float32
    write_set(merged, tmp_path / "three")
    found = read_set(tmp_path / "three")
    assert isinstance(found.description, MixLoraDescription)
    assert (found.description.num_experts, found.description.top_k, found.rank) == (3, config.top_k, RANK)
    save_adapter(tmp_path / "expected", three, config)
    expected = read_set(tmp_path / "expected")
    for module in expected.sizes:
        (a, b), (wanted_a, wanted_b) = pair_of(found, module), pair_of(expected, module)
        torch.testing.assert_close(b @ a, wanted_b @ wanted_a, **LIMIT)
    for name, rows in found.others.items():
        torch.testing.assert_close(rows, three[name] + 0.05)
    # A constant that all logits get changes no softmax.
    torch.testing.assert_close(hecate_logits(tmp_path / "three"), hecate_logits(tmp_path / "expected"), **LIMIT)


def test_experts_are_clustered_by_what_they_add(tmp_path: Path) -> None:
    """As k-means of the dense matrices clusters them, over linears."""
    folder = save_experts_over_linears(tmp_path / "adapter", save_dense("llama", tmp_path / "model"), experts=5, seed=1)
    one = read_set(folder)
    merged = fewer_experts(one, 2, rank=1)
    write_set(merged, tmp_path / "two")
    found = read_set(tmp_path / "two")
    description = found.description
    assert isinstance(description, LinearsDescription)
    assert (description.experts_per_layer, description.r, description.alpha) == ((2,) * LAYERS, 1, 1)
    for layer in range(LAYERS):
        path = f"model.layers.{layer}.self_attn.q_proj"
        dense = np.array([(terms.b_Or @ terms.a_rI).flatten().numpy() for terms in (one.read(f"{path}.experts.{e}") for e in range(5))])
        labels = KMeans(2, n_init=10, random_state=0).fit_predict(dense)
        groups = {tuple(np.flatnonzero(labels == label).tolist()) for label in (0, 1)}
        rows = one.others[router_name(path)]
        means = {tuple((rows[list(group)].mean(0)).tolist()) for group in groups}
        assert {tuple(row.tolist()) for row in merged.result.others[router_name(path)]} == means


def test_mixtures_that_cannot_be_merged_or_shrunk_are_refused(tmp_path: Path) -> None:
    model = save_dense("llama", tmp_path / "model")
    mixture = read_set(save_mixlora(tmp_path / "mixture", model))
    experts = read_set(FORMS["peft experts"](tmp_path / "moe"))
    linears = read_set(save_experts_over_linears(tmp_path / "linears", model))
    over_same = replace(experts, description=replace(experts.description, base_model_name_or_path=str(model)))
    smora = save_experts_over_linears(tmp_path / "smora", model, r=1, router=RouterConfig(score="sigmoid"))
    users = save_experts_over_linears(tmp_path / "users", model, router=RouterConfig(input="user"))
    broken = save_peft(tmp_path / "nan", model, ["q_proj"], experts=False)[0]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    damaged(broken, name, torch.full((RANK, HIDDEN), torch.nan))
    lacking = save_peft(tmp_path / "lacking", model, ["q_proj"], experts=False)[0]
    damaged(lacking, name.replace("_A", "_B"), None)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: read_set(smora), "each of its experts is one rank .*SMoRA"),
        (lambda: read_set(users), "mixed by users .RecLoRA.*hecate export --user"),
        (
            lambda: write_set(stack([read_set(broken)], [1.0]), tmp_path / "out"),
            f"{broken}/adapter_model.safetensors: tensor {name} holds NaN or infinity",
        ),
        (lambda: read_set(lacking), f"{lacking}: has no tensor {name.replace('_A', '_B')}"),
        (lambda: stack([mixture, over_same], [0.5, 0.5]), "a LoRA, without routers.*adapters of different forms"),
        (lambda: stack([mixture, linears], [0.5, 0.5]), "adapters of different forms"),
        (lambda: stack([mixture, replace(mixture, others={k: t + 1 for k, t in mixture.others.items()})], [0.5, 0.5]), "different routers"),
        (lambda: fewer_experts(experts, 2), "its experts are those of its base model\n  its ranks can be fewer"),
        (lambda: fewer_experts(mixture, 1), "experts 1: .*up to 3 in a layer, of which a token goes to 2\n  give from 2 to 2"),
        (lambda: fewer_experts(mixture, 3), "experts 3: .*\n  give from 2 to 2"),
        (lambda: fewer_experts(mixture, 2, rank=9), "rank 9: .* has rank 4\n  give a rank from 1 to 4"),
    ]
    for act, reason in refused:
        with pytest.raises(UserError, match=f"(?s){reason}") as error:
            act()
        assert len(str(error.value).splitlines()) <= 8
    assert not (tmp_path / "out").exists()
