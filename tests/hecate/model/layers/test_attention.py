"""All ways to compute attention give one loss and one gradient, and what cannot be had is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from hecate.data.batches import Batch
from hecate.errors import UserError
from hecate.model.causal_head import LanguageModelHead
from hecate.model.layers import attention_kernels
from hecate.model.layers.attention import AttentionChoice, Way, pick_way, row_multiple, use_way, way_problem
from hecate.model.layers.attention_kernels import AttentionRows, FlashKernel, Scores, package_flash, torchs_flash
from hecate.train.generation import Decoding, generate
from hecate.train.steps.passes import forward_loss
from tests.hecate.model.tiny import tiny
from tests.plain_attention import dense_of_blocks, plain_flash, plain_flex, plain_operator, plain_operators_gradients, plain_varlen

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
            monkeypatch.setattr(attention_kernels, "FLEX_BLOCK", 4)
            monkeypatch.setattr(attention_kernels, "flex_kernel", lambda length: self.flex)
        if self.flash is not None:
            monkeypatch.setattr(attention_kernels, "flash_kernel", lambda: self.flash)


def torchs_with(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> FlashKernel:
    with monkeypatch.context() as patched:
        patched.setattr("torch.nn.attention.varlen.varlen_attn", function)
        return torchs_flash()


def kernels_named(name: str, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    match name:
        case "sdpa":
            return Kernels("sdpa")
        case "flex":
            return Kernels("flex")  # of short rows: torch's formula, which reads the function of a block mask and not its tables
        case "flex by tables":
            return Kernels("flex", flex=plain_flex)
        case "flash of the package":
            return Kernels("flash", flash=package_flash(plain_flash))
    return Kernels("flash", flash=torchs_with(plain_varlen if name == "flash of torch" else _varlen_of_2_11, monkeypatch))


def _varlen_of_2_11(query: Tensor, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """What `varlen_attn` can be given in torch 2.11. It is not called."""
    raise AssertionError


@pytest.fixture
def flash_operator() -> Iterator[None]:
    """On a CPU too, the operator that computes torch's flash attention."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", plain_operator, "CPU")
        library.impl("_flash_attention_backward", plain_operators_gradients, "CPU")
        yield


def loss_and_gradients(head: LanguageModelHead, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = forward_loss(head, batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", ["sdpa", "flex", "flex by tables", "flash of the package", "flash of torch", "flash of torch 2.11"])
@pytest.mark.usefixtures("flash_operator")
def test_every_way_gives_the_loss_and_the_gradients_of_dense_masks(name: str, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense masks are transformers' own. With shared heads of keys, sliding windows shorter than samples, and soft caps."""
    kernels = kernels_named(name, monkeypatch)
    if model_type == "gemma2" and (name == "sdpa" or name.startswith("flash of torch")):
        pytest.skip("knows no soft cap")
    kernels.put_in_place(monkeypatch)
    plain, model = (tiny(model_type, num_hidden_layers=2, **MODELS[model_type]).requires_grad_() for _ in range(2))
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
def test_masks_and_block_tables_allow_what_they_should(rows: list[list[int]], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And blocks of keys that no query attends to are left out, and those that all attend to are named as such."""
    monkeypatch.setattr(attention_kernels, "FLEX_BLOCK", 4)
    batch = batch_of(rows)
    samples, positions = batch.layout.samples, range(LENGTH)

    def allowed(row: list[int], q: int, k: int) -> bool:
        return k <= q and (samples is None or row[q] == row[k]) and (window is None or q - k < window)

    wanted = torch.tensor([[[allowed(row, q, k) for k in positions] for q in positions] for row in batch.segment_ids.tolist()])
    found = AttentionRows(samples, len(rows), LENGTH, CPU)
    dense = found.dense_mask(window)
    assert (dense is None) == (samples is None and window in (None, 40))
    if dense is not None:
        assert torch.equal(dense[:, 0].expand_as(wanted), wanted)
    blocks = found.block_mask(window)
    assert torch.equal(dense_of_blocks(blocks, len(rows))[:, :LENGTH, :LENGTH].expand_as(wanted), wanted)
    tiles = F.pad(wanted, (0, 2, 0, 2)).view(len(rows), 4, 4, 4, 4).transpose(2, 3).flatten(3)
    whole, some = (counts.sum(-1, dtype=torch.int32) for counts in (tiles.all(-1), tiles.any(-1)))
    assert torch.equal(blocks.full_kv_num_blocks[:, 0].expand_as(whole), whole)
    assert torch.equal((blocks.kv_num_blocks + blocks.full_kv_num_blocks)[:, 0].expand_as(some), some)


def test_values_may_be_narrower_than_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda: package_flash(plain_flash))
    found = AttentionRows(batch_of(ROWS["packed"]).layout.samples, 3, LENGTH, CPU)
    query, key, value = (torch.randn(3, 4, LENGTH, width, dtype=torch.float64) for width in (8, 8, 5))
    flash, wanted = (attend(query, key, value, found, Scores(0.3)) for attend in (attention_kernels.flash, attention_kernels.sdpa))
    torch.testing.assert_close(flash, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("old", [False, True])
def test_torchs_flash_attention_takes_what_it_is_given(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its declarations, on tensors without memory; its kernels run on a GPU only."""
    kernel = torchs_with(_varlen_of_2_11, monkeypatch) if old else torchs_flash()
    with FakeTensorMode():
        query = torch.empty(12, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        key, value = (torch.empty(12, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        bounds = torch.empty(4, dtype=torch.int32)
        for window in (None, 3):
            out = kernel.compute(query, key, value, bounds, 5, Scores(0.3, window))
            assert out.shape == query.shape
            grads = torch.autograd.grad(out.sum(), (query, key, value))
            assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


@pytest.mark.slow
def test_a_new_batch_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one width, whatever their samples: flex attention is compiled once, and once more for a layer with a window."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention_kernels, "FLEX_BLOCK", 4)
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=False, backend=counter)
    monkeypatch.setattr(attention_kernels, "flex_kernel", lambda length: compiled)
    compilations = []
    for window in (None, 3):
        for rows in ([[5, 4, 3], [14]], [[1, 6], [2, 2]], [[3, 3], [1, 1, 1]]):
            batch = batch_of(rows)
            found = AttentionRows(batch.layout.samples, 2, LENGTH, CPU)
            query, key = torch.randn(2, 4, LENGTH, 16, requires_grad=True), torch.randn(2, 2, LENGTH, 16, requires_grad=True)
            attention_kernels.flex(query, key, key, found, Scores(0.25, window)).sum().backward()
            compilations.append(counter.frame_count)
    assert compilations == [1, 1, 1, 2, 2, 2]


def test_answers_are_generated_as_transformers_does() -> None:
    """With its cache of keys and its mask of the padding, which no way of ours knows."""
    tokenizer = SimpleNamespace(eos_token_id=2, decode=lambda ids, skip_special_tokens: str(ids.tolist()))
    plain, model = (SimpleNamespace(model=tiny("llama"), tokenizer=tokenizer) for _ in range(2))
    use_way(model.model, "sdpa")
    prompts: Any = [[5, 6], [7, 8, 9, 10]]
    wanted, answers = (generate(base, prompts, Decoding(5), batch_size=2) for base in (plain, model))  # type: ignore[arg-type]
    assert answers == wanted
    with pytest.raises(AssertionError, match="use `generating`"):
        model.model.generate(torch.tensor(prompts[:1]), max_new_tokens=5)


def test_rows_for_flex_attention_have_one_width() -> None:
    assert [row_multiple("flex", GPU, length) for length in (40, 128, 4000)] == [128, 128, 4096]
    assert [row_multiple(way, GPU, 4000) for way in ("sdpa", "flash", None)] == [64] * 3
    assert row_multiple(None, CPU, 4000) == 8


@dataclass
class OnGpu:
    """What `pick_way` asks of a model."""

    dtype: torch.dtype = torch.bfloat16
    device: torch.device = GPU
    head_dim: int = 64
    softcap: float | None = None
    _supports_sdpa: bool = True
    _supports_flash_attn: bool = True
    _supports_attention_backend: bool = True

    def parameters(self) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(dtype=self.dtype, device=self.device)

    def get_decoder(self) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(head_dim=self.head_dim, attn_logit_softcapping=self.softcap))


PACKAGE, TORCHS = (FlashKernel(lambda *given: given[0], has_softcap=has) for has in (True, False))
FULL = torch.float32
PICKS: dict[str, tuple[OnGpu, FlashKernel | None, Way | None, Way | None]] = {
    "bfloat16": (OnGpu(), TORCHS, "flash", "flash"),
    "no flash attention": (OnGpu(), None, "flex", "sdpa"),
    "float32": (OnGpu(FULL), PACKAGE, "flex", "sdpa"),
    "float64": (OnGpu(torch.float64), PACKAGE, "sdpa", "sdpa"),
    "soft cap": (OnGpu(softcap=50.0, _supports_sdpa=False), TORCHS, "flex", "flex"),
    "soft cap, the package": (OnGpu(softcap=50.0, _supports_sdpa=False), PACKAGE, "flash", "flash"),
    "small heads": (OnGpu(FULL, head_dim=8), PACKAGE, "sdpa", "sdpa"),
    "attention of another kind": (OnGpu(_supports_flash_attn=False), PACKAGE, None, None),
    "a CPU": (OnGpu(FULL, CPU), PACKAGE, None, None),
}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", PICKS)
def test_auto_takes_the_fastest_that_can_be_had(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kernel, packed, unpacked = PICKS[case]
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda: kernel)
    assert pick_way(AttentionChoice("auto", packed=True), model) == packed
    assert pick_way(AttentionChoice("auto", packed=False), model) == unpacked


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("asked", "model", "why"),
    [
        ("flash", OnGpu(FULL), "flash computes in bfloat16, but the model is in float32"),
        ("flash", OnGpu(device=CPU), "flash does not run on a CPU"),
        ("flash", OnGpu(), "the package flash-attn is not installed"),
        ("flash", OnGpu(_supports_flash_attn=False), "does not fit OnGpu"),
        ("flash", OnGpu(head_dim=512), "takes heads of 256 elements at most, but those of OnGpu have 512"),
        ("flex", OnGpu(FULL, CPU), "flex has no backward pass on a CPU"),
        ("flex", OnGpu(torch.float64), "but the model is in float64"),
        ("flex", OnGpu(head_dim=8), "needs heads of 16 elements or more, but those of OnGpu have 8"),
    ],
)
def test_a_way_that_cannot_be_had_is_refused_with_a_hint(asked: Way, model: OnGpu, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda: PACKAGE if "installed" not in why else None)
    with pytest.raises(UserError, match=why) as refused:
        pick_way(AttentionChoice(asked), model)
    assert "\n  " in str(refused.value)


def test_flash_attention_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in str(way_problem("flash", torch.bfloat16, GPU))


def test_attention_with_what_no_way_knows_is_refused() -> None:
    model = tiny("llama")
    use_way(model, "sdpa")
    with pytest.raises(UserError, match="gives attention s_aux"):
        model.model(input_ids=torch.ones(1, 4, dtype=torch.int64), s_aux=torch.zeros(2))
