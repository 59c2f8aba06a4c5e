"""All ways to compute attention give one loss and one gradient, and what cannot be had is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from hecate.data.batches import Batch, packed_samples
from hecate.errors import UserError
from hecate.model import attention, attention_kernels
from hecate.model.attention import AttentionChoice, Way, generating, pick_way, row_multiple, use_way, way_problem
from hecate.model.attention_kernels import AttentionRows, FlashKernel, Scores, package_flash, torchs_flash
from hecate.model.causal_head import LanguageModelHead
from hecate.train.step import forward_loss
from tests.hecate.model.tiny import tiny
from tests.plain_attention import dense_of_blocks, plain_flash, plain_flex, plain_varlen

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTH = 14
ROWS: dict[str, list[list[int]]] = {
    "packed": [[5, 4, 3], [1, 6], [14]],
    "padded": [[9], [14], [0]],
    "one each": [[14], [14]],
}
"""the samples' lengths; padding fills the rest of a row"""
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"sliding_window": 3},
    "gemma2": {"sliding_window": 3, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
}


def batch_of(rows: list[list[int]]) -> Batch:
    ids = torch.randint(3, 32, (len(rows), LENGTH), generator=torch.Generator().manual_seed(1))
    segments, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, begin : begin + length] = number
            positions[row, begin : begin + length] = torch.arange(length)
            begin += length
    targets = ids.roll(-1, 1).masked_fill(segments == 0, -100)
    return Batch(ids, targets, positions, segments, torch.zeros_like(ids), torch.zeros_like(ids))


@dataclass(frozen=True)
class Kernels:
    """A way, and what stands in for its kernels."""

    way: Way
    flex: Callable[..., Tensor] | None = None
    flash: FlashKernel | None = None

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # torch refuses gradients of flex attention on a CPU, but its eager formula has them.
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
        if self.flex is not None:
            monkeypatch.setattr(attention_kernels, "flex_kernel", lambda length: self.flex)
        if self.flash is not None:
            monkeypatch.setattr(attention_kernels, "flash_kernel", lambda: self.flash)


def eager_flex(*given: Any, **named: Any) -> Tensor:
    """torch's own formula of flex attention, which looks at the function of a block mask only, and not at its tables."""
    with torch.compiler.set_stance("force_eager"):
        return flex_attention(*given, **named)


def torchs_with(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> FlashKernel:
    with monkeypatch.context() as patched:
        patched.setattr("torch.nn.attention.varlen.varlen_attn", function)
        kernel = torchs_flash()
    assert kernel is not None
    return kernel


def kernels_named(name: str, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    match name:
        case "sdpa":
            return Kernels("sdpa")
        case "flex":
            return Kernels("flex", flex=eager_flex)
        case "flex by tables":
            return Kernels("flex", flex=plain_flex)
        case "flash of the package":
            return Kernels("flash", flash=package_flash(plain_flash))
    return Kernels("flash", flash=torchs_with(plain_varlen, monkeypatch))


def loss_and_gradients(head: LanguageModelHead, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = forward_loss(head, batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", ["sdpa", "flex", "flex by tables", "flash of the package", "flash of torch"])
def test_every_way_gives_the_loss_and_the_gradients_of_dense_masks(name: str, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense masks are transformers' own. With shared heads of keys, sliding windows shorter than samples, and soft caps."""
    kernels = kernels_named(name, monkeypatch)
    if model_type == "gemma2" and (name == "sdpa" or name == "flash of torch"):
        pytest.skip("knows no soft cap")
    kernels.put_in_place(monkeypatch)
    monkeypatch.setattr(attention_kernels, "FLEX_BLOCK", 4)
    plain, model = (tiny(model_type, **MODELS[model_type]).requires_grad_() for _ in range(2))
    plain_head, head = LanguageModelHead(plain), LanguageModelHead(model, kernels.way)
    # transformers' own attention for Gemma 2 has a softmax in float32.
    exact = 1e-6 if model_type == "gemma2" else 1e-12
    for rows in ROWS.values():
        wanted, wanted_grads = loss_and_gradients(plain_head, plain, batch_of(rows))
        loss, grads = loss_and_gradients(head, model, batch_of(rows))
        torch.testing.assert_close(loss, wanted, rtol=exact, atol=0)
        assert grads.keys() == wanted_grads.keys()
        for parameter, grad in grads.items():
            torch.testing.assert_close(grad, wanted_grads[parameter], rtol=1e3 * exact, atol=10 * exact)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9, 40])
@pytest.mark.parametrize("rows", [*ROWS.values(), [[4, 4, 4, 2], [2, 12]]])
def test_block_tables_allow_what_the_dense_mask_does(rows: list[list[int]], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "FLEX_BLOCK", 4)
    batch = batch_of(rows)
    found = AttentionRows(batch.layout.samples, len(rows), LENGTH, CPU)
    ids = batch.segment_ids.tolist()
    wanted = torch.tensor(
        [
            [
                [k <= q and (batch.layout.samples is None or row[q] == row[k]) and (not window or q - k < window) for k in range(LENGTH)]
                for q in range(LENGTH)
            ]
            for row in ids
        ]
    )
    blocks = found.block_mask(window)
    assert torch.equal(dense_of_blocks(blocks, len(rows))[:, :LENGTH, :LENGTH].expand_as(wanted), wanted)
    dense = found.dense_mask(window)
    assert torch.equal(
        torch.ones(1, 1, LENGTH, LENGTH).tril().bool().expand_as(wanted[:, None]) if dense is None else dense.expand_as(wanted[:, None]),
        wanted[:, None],
    )
    in_blocks = torch.nn.functional.pad(wanted, (0, 2, 0, 2)).view(len(rows), 4, 4, 4, 4).transpose(2, 3).flatten(3)
    assert torch.equal(blocks.full_kv_num_blocks[:, 0].expand(len(rows), 4), in_blocks.all(-1).sum(-1, dtype=torch.int32))
    assert torch.equal(
        (blocks.kv_num_blocks + blocks.full_kv_num_blocks)[:, 0].expand(len(rows), 4), in_blocks.any(-1).sum(-1, dtype=torch.int32)
    )
