from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hecate.data.batches import block_diagonal_mask, packed_samples
from hecate.errors import UserError
from hecate.model import causal_head as head_module
from hecate.model.causal_head import LanguageModelHead, chunked_cross_entropy
from tests.hecate.model.tiny import tiny, token_ids

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
}
AFTER_PROJECTION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "llama": lambda logits: logits,
    "gemma2": lambda logits: 2.0 * torch.tanh(logits / 2.0),
    "cohere": lambda logits: logits / 4,
    "granite": lambda logits: logits / 8,
}


def frozen(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return tiny(model_type, dtype, **MODELS.get(model_type, {}), **changes).requires_grad_(False)


def hidden_and_targets(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = token_ids()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[:, :-1].flatten(0, 1).detach(), ids[:, 1:].flatten()


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("rows", [512, 16, 5, 1])
def test_the_loss_and_its_gradient_are_those_of_plain_cross_entropy(model_type: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens: in one chunk, one full chunk, chunks and a rest, and one by one."""
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", rows)
    model = frozen(model_type)
    head = LanguageModelHead(model)
    hidden, target = hidden_and_targets(model)
    got_from, wanted_from = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = head.loss_sum(got_from, target)
    logits = AFTER_PROJECTION[model_type](wanted_from @ model.lm_head.weight.T)
    wanted = F.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    (got / 3).backward()
    (wanted / 3).backward()
    assert got_from.grad is not None
    assert wanted_from.grad is not None
    torch.testing.assert_close(got_from.grad, wanted_from.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rows", [512, 5])
def test_each_token_may_have_a_weight(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", rows)
    model = frozen("llama")
    hidden, target = hidden_and_targets(model)
    weight = torch.linspace(0, 2, len(target), dtype=torch.float64)
    got_from, wanted_from = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = LanguageModelHead(model).loss_sum(got_from, target, weight)
    wanted = (F.cross_entropy(wanted_from @ model.lm_head.weight.T, target, reduction="none") * weight).sum()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    for loss in (got, wanted):
        loss.backward()
    assert got_from.grad is not None
    assert wanted_from.grad is not None
    torch.testing.assert_close(got_from.grad, wanted_from.grad, rtol=1e-11, atol=1e-13)
    empty = LanguageModelHead(model).loss_sum(hidden[:0], target[:0], weight[:0])
    assert empty.item() == 0


@pytest.mark.parametrize("model_type", MODELS)
def test_the_parts_make_the_models_own_loss(model_type: str) -> None:
    model = frozen(model_type)
    ids = token_ids()
    hidden, target = hidden_and_targets(model)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(LanguageModelHead(model).logits(hidden), logits, rtol=1e-12, atol=1e-12)
    wanted = F.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(LanguageModelHead(model).loss_sum(hidden, target), wanted, rtol=1e-12, atol=0)


def test_bf16_sums_in_fp32() -> None:
    model = frozen("llama", torch.bfloat16)
    hidden, target = hidden_and_targets(model)
    hidden.requires_grad_()
    loss = LanguageModelHead(model).loss_sum(hidden, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    wanted = F.cross_entropy((hidden.detach() @ model.lm_head.weight.T).float(), target, reduction="sum")
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=0)


def test_gradients_of_a_bf16_projection_are_summed_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 tokens with the hidden state 1 and the label 0 of two: each has the gradients -1/2 and 1/2. 128 - 1/2 is 128 in bfloat16."""
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", 2)
    weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16))
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    chunked_cross_entropy(hidden, torch.zeros(600, dtype=torch.int64), lambda rows: F.linear(rows, weight), [weight]).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[-300.0], [300.0]]


def test_bf16_gradients_are_scaled_by_a_factor_that_is_not_rounded_to_bf16() -> None:
    """No eight binary digits divided by 3 lie in the middle of two values of bfloat16, so the quotient has one right rounding."""
    model = frozen("llama", torch.bfloat16)
    hidden, target = hidden_and_targets(model)
    got_from, whole_from = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    head = LanguageModelHead(model)
    (head.loss_sum(got_from, target) / 3).backward()
    head.loss_sum(whole_from, target).backward()
    assert got_from.grad is not None
    assert whole_from.grad is not None
    assert torch.equal(got_from.grad, (whole_from.grad.double() / 3).bfloat16())


@pytest.mark.parametrize("leaf", ["projection", "hidden"])
def test_without_gradients_nothing_is_computed_of_a_backward_pass(leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of a model whose output projection trains."""
    model = frozen("llama")
    model.lm_head.weight.requires_grad_(leaf == "projection")
    hidden, target = hidden_and_targets(model)
    hidden.requires_grad_(leaf == "hidden")
    head = LanguageModelHead(model)
    wanted = head.loss_sum(hidden, target)
    real, calls = torch.autograd.grad, []

    def counted(*arguments: Any) -> Any:
        calls.append(None)
        return real(*arguments)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with torch.no_grad():
        got = head.loss_sum(hidden, target)
    assert calls == []
    assert got.item() == wanted.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_two_chunks_only_one_has_logits_at_a_time(dtype: torch.dtype) -> None:
    made: list[StorageWeakRef] = []
    left: list[bool] = []

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        left.extend(not storage.expired() for storage in made)
        logits = F.linear(rows, torch.ones(7, 3, dtype=dtype))
        made.append(StorageWeakRef(logits.untyped_storage()))
        return logits

    hidden = torch.randn((1300, 3), dtype=dtype).requires_grad_()
    chunked_cross_entropy(hidden, torch.zeros(1300, dtype=torch.int64), logits_of).backward()
    assert left == [False] * 3


def test_no_label_tokens() -> None:
    model = frozen("llama")
    hidden = torch.zeros(0, 16, dtype=torch.float64, requires_grad=True)
    loss = LanguageModelHead(model).loss_sum(hidden, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 16)


def test_hidden_is_what_the_model_computes() -> None:
    model, ids = frozen("llama"), token_ids()
    got = LanguageModelHead(model).hidden(ids, None, torch.arange(9).expand(2, 9))
    torch.testing.assert_close(got, model.model(input_ids=ids).last_hidden_state, rtol=1e-12, atol=1e-12)


SEGMENTS = torch.tensor([[1] * 5 + [2] * 4, [1] * 1 + [2] * 6 + [0] * 2])
POSITIONS = torch.tensor([[*range(5), *range(4)], [0, *range(6), 0, 0]])
WINDOWS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 3}, "gemma2": {"sliding_window": 3}, "llama": {}}


@pytest.mark.parametrize("model_type", WINDOWS)
def test_packed_samples_are_computed_as_each_alone(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where layers attend to a sliding window only, which is shorter than the samples.

    transformers takes Gemma 2's softmax in float32, whose sum over a longer row is rounded in another order: it is kept in float64 in
    this test, so that the comparison shows which positions are attended to and nothing else.
    """
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))
    model, ids = frozen(model_type, **WINDOWS[model_type]), token_ids()
    got = LanguageModelHead(model).hidden(ids, packed_samples(SEGMENTS), POSITIONS)
    for row, begin, end in ((0, 0, 5), (0, 5, 9), (1, 0, 1), (1, 1, 7)):
        alone = model.model(input_ids=ids[row : row + 1, begin:end]).last_hidden_state
        torch.testing.assert_close(got[row : row + 1, begin:end], alone, rtol=1e-12, atol=1e-12)


def test_the_masks_of_transformers_are_ours_where_there_is_no_window() -> None:
    model, ids = frozen("llama"), token_ids()
    ours = model.model(input_ids=ids, attention_mask=block_diagonal_mask(SEGMENTS), position_ids=POSITIONS).last_hidden_state
    assert torch.equal(LanguageModelHead(model).hidden(ids, packed_samples(SEGMENTS), POSITIONS), ours)


def test_a_model_whose_packed_samples_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(UserError, match="LlamaForCausalLM the samples of a packed sequence see each other"):
        LanguageModelHead(tiny("llama"))


def test_a_model_that_does_not_give_its_decoder_is_refused() -> None:
    with pytest.raises(UserError, match="unsupported architecture: Llama4ForCausalLM does not say"):
        LanguageModelHead(tiny("llama4_text"))


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    model = tiny("llama")
    model.register_forward_hook(lambda module, given, outputs: setattr(outputs, "logits", 3 * outputs.logits))
    with pytest.raises(UserError, match=r"unsupported architecture.*ForCausalLM") as error:
        LanguageModelHead(model)
    assert len(str(error.value).splitlines()) <= 8


@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_the_mode_alone(training: bool) -> None:
    model = frozen("llama").train(training)
    LanguageModelHead(model)
    assert model.training == training
