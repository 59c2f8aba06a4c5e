"""A model's folder that is damaged, mistaken or made to do harm is refused in a sentence that names it; no other file is read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.hub_kernels import lazy_load_kernel

from hecate.data.chat.conversations import TemplateRefusal, _apply
from hecate.errors import UserError
from hecate.model.files.base_folder import refuse_endless_values
from hecate.model.files.load import load_model, load_tokenizer, outline_of, read_config, resolve_model
from testing.tiny_run import make_workshop

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "a size that is null": {"hidden_size": None},
    "a size that is text": {"hidden_size": "many"},
    "a size that is a list": {"intermediate_size": [1, 2]},
    "a negative size": {"hidden_size": -8},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 7, "num_key_value_heads": 3},
    "more groups of heads than heads": {"num_key_value_heads": 64},
    "a thousand million layers": {"num_hidden_layers": 10**9},
    "layers that are text": {"num_hidden_layers": "two"},
    "a size beyond memory": {"intermediate_size": 2**40},
    "an endless vocabulary": {"vocab_size": 10**30},
    "an unknown activation": {"hidden_act": "boom"},
    "an activation that is a number": {"hidden_act": 7},
    "unknown rotary positions": {"rope_parameters": {"rope_type": "boom", "rope_theta": 1.0}},
    "rotary positions that are text": {"rope_parameters": "none"},
    "an unknown type of model": {"model_type": "boom"},
    "a type of model that is null": {"model_type": None},
    "a type of model that is a list": {"model_type": ["llama"]},
    "weights elsewhere": {"transformers_weights": "../../secret.safetensors"},
    "attention from a hub": {"attn_implementation": "somebody/kernels"},
    "attention from a hub, inside": {"_attn_implementation": "somebody/kernels@main"},
    "a quantisation that nobody knows": {"quantization_config": {"quant_method": "boom"}},
    "a quantisation that is text": {"quantization_config": "boom"},
    "a dtype that nobody knows": {"dtype": "float3"},
    "an end that is text": {"eos_token_id": "</s>"},
    "a padding outside the vocabulary": {"pad_token_id": 10**6},
}

HARMLESS = ("a quantisation that nobody knows",)
"""transformers leaves it out, and reads the weights as they are"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop")) / "model"


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def take(model: Path) -> None:
    """Read and load all of it, as training does."""
    source = resolve_model(str(model))
    outline_of(read_config(source), source)
    load_model(source, torch.float32, torch.device("cpu"))


def refusal_of(action: Callable[[], object], model: Path) -> str:
    """Any other error than hecate's own is a traceback for the user."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert model.name in text
    assert len(text.splitlines()) <= 8
    return text


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_is_refused_by_its_files_name_or_harmless(model: Path, name: str) -> None:
    change(model / "config.json", CONFIGURATIONS[name])
    if name in HARMLESS:
        take(model)
    else:
        refusal_of(lambda: take(model), model)


@pytest.mark.parametrize("wishes", [{}, {"attn_implementation": "flash_attention_2"}, {"_experts_implementation": "deepgemm"}])
def test_no_kernel_is_fetched(model: Path, wishes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 5.25 transformers takes kernels from a hub wherever a card has any, unless it is told otherwise."""

    def fetch(*_: Any, **__: Any) -> Any:
        raise AssertionError("a kernel is fetched")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetch)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.set_use_kernels", lambda _, use, *__: use and fetch())
    change(model / "config.json", wishes)
    take(model)
    lazy_load_kernel("causal-conv1d", {})


@pytest.mark.parametrize("content", ["", "[]", "null", "7", '"llama"', "{", "[" * 100_000, '{"model_type": "llama"', "\x00", "\ud800"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_such_file_is_refused(model: Path, file: str, content: str) -> None:
    (model / file).write_bytes(content.encode("utf-8", errors="surrogatepass"))
    refusal_of(lambda: (take(model), load_tokenizer(resolve_model(str(model)))), model)


def test_an_adapter_in_the_folder_is_not_applied_unasked(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "would apply an adapter" in refusal_of(lambda: take(model), model)


@pytest.mark.parametrize("values", [{"num_hidden_layers": 10_001}, {"n_layer": 10**6}, {"text_config": {"vocab_size": 2**31}}])
def test_sizes_that_nothing_has_are_refused_before_anything_is_built(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model: \w+: \d+ is more than any model has"):
        refuse_endless_values(values, Path("model"))
    refuse_endless_values({"num_hidden_layers": 126, "vocab_size": 10**6, "rope_theta": 1e30, "tied": True, "layers": None}, Path("model"))


class Plants:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def test_no_pickled_weights_are_read(model: Path, tmp_path: Path) -> None:
    """Beside a stray safetensors file, or alone."""
    planted = tmp_path / "planted"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Plants(planted)))
    (model / "model.safetensors").rename(model / "stray.safetensors")
    refusal_of(lambda: take(model), model)
    (model / "stray.safetensors").unlink()
    refusal_of(lambda: take(model), model)
    assert not planted.exists()


@pytest.mark.parametrize("called", ["I32", "I64", "U8", "BOOL", "X9", "F32 of another size"])
def test_weights_that_are_called_something_else_are_not_taken(model: Path, called: str) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header["model.layers.0.mlp.up_proj.weight"]
    entry |= {"shape": [entry["shape"][0] * 2, entry["shape"][1] // 2]} if " " in called else {"dtype": called}
    if called in ("I64", "U8", "BOOL"):
        width = 8 if called == "I64" else 1
        entry["shape"] = [entry["shape"][0] * 4 // width, entry["shape"][1]]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refusal_of(lambda: take(model), model)


TEMPLATES = (
    "{{ 1 / 0 }}",
    "{{ messages[0].content + 1 }}",
    "{{ messages[99].content.x }}",
    "{{ 'a' | round }}",
    "{% include 'x' %}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_is_named_with_its_reason(original: Path, template: str) -> None:
    tokenizer = load_tokenizer(resolve_model(str(original)))
    tokenizer.chat_template = template
    with pytest.raises(TemplateRefusal):
        _apply(tokenizer, [{"role": "user", "content": "a"}])
