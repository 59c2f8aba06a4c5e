from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hecate.errors import UserError
from hecate.model.files.load import ModelSource, load_model, load_tokenizer, pick_dtype, resolve_model
from tests.hecate.model.tiny import tiny, token_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama", torch.float32).save_pretrained(folder)
    return folder


def copy_of(saved: Path, folder: Path) -> Path:
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_survive_in_the_asked_dtype_and_are_frozen(saved: Path, dtype: torch.dtype) -> None:
    model, original = load_model(resolve_model(str(saved)), dtype, CPU), tiny("llama", torch.float32)
    wanted = original.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype, name
        assert not parameter.requires_grad, name
        assert torch.equal(parameter, wanted[name].to(dtype)), name


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 3)])
def test_transformers_is_told_to_put_weights_onto_the_gpu(saved: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/mock_cuda/test_loading.py` shows what that leads to."""
    model = mock.MagicMock(generation_config=None)
    load = mock.Mock(return_value=(model, {"missing_keys": []}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_model(resolve_model(str(saved)), torch.bfloat16, device)
    assert load.call_args.kwargs.get("device_map") == (None if device == CPU else {"": device})


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_first_layers_alone(model_type: str, tmp_path: Path) -> None:
    whole = tiny(model_type, torch.float32)
    whole.save_pretrained(tmp_path)
    cut: Any = load_model(resolve_model(str(tmp_path)), torch.float32, CPU, num_hidden_layers=2)
    assert cut.config.num_hidden_layers == 2
    assert len(getattr(cut.config, "layer_types", None) or [0, 0]) == 2, "the kinds of the layers left out are still listed"
    assert len(cut.model.layers) == 2
    wanted = whole.state_dict()
    assert {name for name in wanted if ".layers.2." not in name} == set(cut.state_dict())
    for name, value in cut.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    whole.model.layers = whole.model.layers[:2]
    ids = token_ids()
    torch.testing.assert_close(cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_as_many_layers_as_there_are(saved: Path) -> None:
    model: Any = load_model(resolve_model(str(saved)), torch.float32, CPU, num_hidden_layers=3)
    assert len(model.model.layers) == 3


def test_more_layers_than_there_are_are_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"model\.num_hidden_layers: 4.*only 3"):
        load_model(resolve_model(str(saved)), torch.float32, CPU, num_hidden_layers=4)


def test_missing_folders_and_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_model(str(tmp_path))
    copy_of(saved, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="no_such_package"):
        resolve_model("package:no_such_package")
    with pytest.raises(UserError, match=r"GGUF|gguf"):
        resolve_model("package:json")


def test_a_missing_weight_is_refused(saved: Path, tmp_path: Path) -> None:
    """transformers would fill it with random numbers and say so in a warning only."""
    copy_of(saved, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(resolve_model(str(tmp_path)), torch.float32, CPU)


def test_weights_of_another_shape_are_refused(saved: Path, tmp_path: Path) -> None:
    copy_of(saved, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(5)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(resolve_model(str(tmp_path)), torch.float32, CPU)


def test_damaged_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    copy_of(saved, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is the download complete"):
        load_model(resolve_model(str(tmp_path)), torch.float32, CPU)


@pytest.mark.parametrize(
    "config", ["{", json.dumps({"model_type": "no_such_model"}), json.dumps({})], ids=["no JSON", "unknown type", "no type"]
)
def test_a_bad_configuration_is_refused(saved: Path, tmp_path: Path, config: str) -> None:
    copy_of(saved, tmp_path)
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match="configuration") as error:
        load_model(resolve_model(str(tmp_path)), torch.float32, CPU)
    assert len(str(error.value).splitlines()) <= 8


def test_a_model_that_is_no_causal_language_model_is_refused(saved: Path, tmp_path: Path) -> None:
    copy_of(saved, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}), encoding="utf-8")
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(resolve_model(str(tmp_path)), torch.float32, CPU)


def test_a_missing_tokenizer_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(resolve_model(str(saved)))


def test_a_named_dtype_is_taken_and_auto_is_one_to_train_in() -> None:
    assert pick_dtype("float64", CPU) == torch.float64
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_a_model_with_experts_runs_in_float64(tmp_path: Path) -> None:
    """transformers' own way for experts, one grouped product, does not."""
    tiny("mixtral", torch.float64).save_pretrained(tmp_path)
    model = load_model(resolve_model(str(tmp_path)), torch.float64, CPU)
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()


def test_a_multimodal_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """But not one of which transformers loads the language model alone."""
    source = ModelSource(tmp_path, None)
    AutoConfig.for_model("gemma3").save_pretrained(tmp_path)
    for layers in (None, 1):
        with pytest.raises(UserError, match=r"(?s)gemma3 is a multimodal model \(Gemma3ForConditionalGeneration\).*model_type gemma3_text"):
            load_model(source, torch.float32, CPU, layers)
    AutoConfig.for_model("llama4").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(source, torch.float32, CPU)
