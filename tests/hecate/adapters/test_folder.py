"""An adapter folder is read back bit for bit, is complete or refused, and never runs code."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hecate.adapters.folder import save_adapter
from hecate.adapters.mixlora.description import load_mixlora
from hecate.errors import UserError
from tests.hecate.adapters.making import config_of, tensors_of
from tests.hecate.checkpoint.disk import Killed, watched_disk


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nope: no such folder\n  give the folder of a run, a checkpoint, an adapter or a whole model"):
        load_mixlora(tmp_path / "nope")
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read: .*; is this an adapter folder\?"):
        load_mixlora(tmp_path)


def test_round_trip(tmp_path: Path) -> None:
    config, tensors = config_of(use_rslora=True, extra={"family": "mixlora"}), tensors_of()
    save_adapter(tmp_path / "adapter", tensors, config)
    found, found_config = load_mixlora(tmp_path / "adapter")
    assert found_config == config
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert sorted(os.listdir(tmp_path / "adapter")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(tmp_path) == ["adapter"]


def test_the_files_as_other_programs_see_them(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", tensors_of(dtype=torch.bfloat16), config_of())
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == 2 * (2 + 1 + 3 * 4)
    assert all(tensor.dtype is torch.float32 for tensor in found.values())
    name = "mixlora.layers.1.mlp.down_proj.experts.2.lora_A.weight"
    assert torch.equal(found[name], tensors_of(dtype=torch.bfloat16)[name].float())
    value = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (value["lora_dropout"], value["hecate"]["lora_dropout"], "jitter_noise" in value) == (1e-9, 0.05, False)


def test_experts_per_layer(tmp_path: Path) -> None:
    config = config_of(num_experts=(2, 4))
    save_adapter(tmp_path / "adapter", tensors_of((2, 4)), config)
    found, found_config = load_mixlora(tmp_path / "adapter")
    assert found_config == config
    assert found["mixlora.layers.1.mlp.moe_gate.weight"].shape == (4, 6)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate_proj\.experts\.2\.lora_A\.weight is missing"):
        save_adapter(tmp_path / "other", tensors_of((2, 4)), config_of(num_experts=4))


@pytest.mark.parametrize("name", sorted(tensors_of()))
def test_each_missing_tensor_is_named_on_saving_and_on_loading(tmp_path: Path, name: str) -> None:
    tensors = tensors_of()
    save_adapter(tmp_path / "adapter", tensors, config_of())
    del tensors[name]
    with pytest.raises(UserError, match=f"cannot be saved.*tensor {name} is missing"):
        save_adapter(tmp_path / "short", tensors, config_of())
    assert os.listdir(tmp_path) == ["adapter"]
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors: tensor {name} is missing"):
        load_mixlora(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mixlora.layers.0.mlp.moe_gate.weight", (4, 6)),
        ("mixlora.layers.1.mlp.moe_gate.weight", (3, 7)),
        ("mixlora.layers.0.mlp.gate_proj.experts.1.lora_A.weight", (3, 6)),
        ("mixlora.layers.0.mlp.gate_proj.experts.1.lora_A.weight", (6, 2)),
        ("mixlora.layers.0.mlp.gate_proj.experts.1.lora_B.weight", (11, 2)),
        ("mixlora.layers.0.mlp.down_proj.experts.2.lora_A.weight", (2, 11)),
        ("mixlora.layers.0.mlp.down_proj.experts.2.lora_B.weight", (7, 2)),
        ("mixlora.layers.1.self_attn.q_proj.lora_A.weight", (2, 5)),
        ("mixlora.layers.1.self_attn.q_proj.lora_B.weight", (8, 3)),
        ("mixlora.layers.1.self_attn.q_proj.lora_B.weight", (16,)),
        ("mixlora.layers.1.self_attn.q_proj.lora_B.weight", (0, 2)),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"tensor {name} has the shape"):
        save_adapter(tmp_path / "adapter", tensors_of() | {name: torch.zeros(shape)}, config_of())


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    for stranger in (
        "mixlora.layers.2.mlp.moe_gate.weight",
        "mixlora.layers.0.mlp.up_proj.experts.0.lora_A.weight",
        "x",
    ):
        with pytest.raises(UserError, match=f"tensor {stranger} does not belong"):
            save_adapter(tmp_path / "adapter", tensors_of() | {stranger: torch.zeros(3, 6)}, config_of())
    router = "mixlora.layers.1.mlp.moe_gate.weight"
    for value in (float("nan"), float("inf"), 1e300):
        with pytest.raises(UserError, match=f"tensor {router} holds NaN or infinity"):
            save_adapter(tmp_path / "a", tensors_of() | {router: torch.full((3, 6), value, dtype=torch.float64)}, config_of())
    with pytest.raises(UserError, match=f"tensor {router} is torch.int64"):
        save_adapter(tmp_path / "adapter", tensors_of() | {router: torch.ones(3, 6, dtype=torch.int64)}, config_of())
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match="adapter: exists already"):
        save_adapter(tmp_path / "adapter", tensors_of(), config_of())
    assert os.listdir(tmp_path / "adapter") == []


def test_a_kill_or_a_failure_at_any_operation_leaves_no_half_adapter(tmp_path: Path) -> None:
    for fatal in range(1, 100):
        for error in (Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            root = tmp_path / f"{fatal}{type(error).__name__}"
            root.mkdir()

            def stop(number: int, operation: str, args: tuple, fatal: int = fatal, error: BaseException = error) -> None:
                if number == fatal:
                    raise error

            try:
                with watched_disk(stop):
                    save_adapter(root / "adapter", tensors_of(), config_of())
            except Killed:
                pass
            except UserError as caught:
                assert "No space left" in str(caught)  # noqa: PT017
                assert [path.name for path in root.iterdir() if path.name != "adapter"] == []
            else:
                assert fatal > 10
                return
            if (root / "adapter").exists():
                load_mixlora(root / "adapter")


def old_name(name: str) -> str:
    """By hand: the name that an adapter of the older dialect has for one of `tensors_of`."""
    layer = name.split(".")[2]
    if "moe_gate" in name:
        return f"mixlora.layers.{layer}.gate.weight"
    if ".mlp." in name:
        module, expert, matrix = name.split(".")[4], name.split(".")[6], name.split(".")[7]
        old = {"gate_proj": "w1_proj", "down_proj": "w2_proj"}[module]
        return f"mixlora.layers.{layer}.experts.{expert}.{old}.{matrix}.weight"
    return name


def write_foreign(folder: Path, weights: object, **changes: object) -> None:
    folder.mkdir()
    value = {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/llama",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "gate_proj", "down_proj"],
        "routing_strategy": "mixlora",
        "num_experts": 3,
        "act_fn": "silu",
        "top_k": 2,
    }
    (folder / "adapter_config.json").write_text(json.dumps(value | changes))
    torch.save(weights, folder / "adapter_model.bin")


def test_a_bin_file_of_another_program(tmp_path: Path) -> None:
    tensors = tensors_of(dtype=torch.float16)
    write_foreign(tmp_path / "a", tensors)
    found, config = load_mixlora(tmp_path / "a")
    assert (config.dropout, config.num_layers, config.base_model_name_or_path) == (0.1, 2, "some/llama")
    assert all(torch.equal(found[name], tensors[name].float()) for name in tensors)


@pytest.mark.parametrize("modules", [["q_proj", "w1_proj", "w2_proj"], {"q_proj": True, "w1_proj": True, "w2_proj": True}])
def test_the_older_dialect(tmp_path: Path, modules: object) -> None:
    tensors = tensors_of()
    old = {old_name(name): tensor for name, tensor in tensors.items()}
    assert "mixlora.layers.1.experts.2.w2_proj.lora_B.weight" in old
    write_foreign(tmp_path / "a", old, routing_strategy="mixtral", target_modules=modules)
    found, config = load_mixlora(tmp_path / "a")
    assert config.target_modules == ("q_proj", "gate_proj", "down_proj")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    both = tensors_of() | {"mixlora.layers.0.gate.weight": torch.zeros(3, 6)}
    write_foreign(tmp_path / "a", both)
    with pytest.raises(UserError, match=r"mixlora\.layers\.0\.mlp\.moe_gate\.weight is there twice"):
        load_mixlora(tmp_path / "a")


def test_a_layer_left_out_in_the_middle_is_named(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in tensors_of((3, 3, 3)).items() if ".layers.1." not in name}
    write_foreign(tmp_path / "a", tensors)
    with pytest.raises(UserError, match=r"adapter_model\.bin: tensor mixlora\.layers\.1\..* is missing"):
        load_mixlora(tmp_path / "a")


def test_a_promise_of_any_number_of_experts_is_refused_at_once(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a", tensors_of() | {"mixlora.layers.900000.x": torch.zeros(1)}, num_experts=1_000_000)
    with pytest.raises(UserError, match="is missing"):
        load_mixlora(tmp_path / "a")


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


def test_a_bin_file_that_would_run_code_runs_none(tmp_path: Path) -> None:
    trace = tmp_path / "code has run"
    write_foreign(tmp_path / "a", tensors_of() | {"x": Hostile(trace)})
    with pytest.raises(UserError, match=r"adapter_model\.bin: refused"):
        load_mixlora(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    with pytest.raises(UserError, match=r"adapter_model\.bin: refused"):
        load_mixlora(tmp_path / "a")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile(trace)))  # noqa: S301  the bait does bite where pickles are trusted
    assert trace.exists()


@pytest.mark.parametrize("weights", [[torch.zeros(1)], {"x": 3}, {3: torch.zeros(1)}, {"x": {"y": torch.zeros(1)}}, None])
def test_a_bin_file_of_another_kind_is_refused(tmp_path: Path, weights: object) -> None:
    write_foreign(tmp_path / "a", weights)
    with pytest.raises(UserError, match="not a flat table of tensors"):
        load_mixlora(tmp_path / "a")


@pytest.mark.parametrize("data", [b"", b"\x80", b"PK\x03\x04 torn", b"{}"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_torn_weights_are_refused(tmp_path: Path, data: bytes, file: str) -> None:
    write_foreign(tmp_path / "a", tensors_of())
    (tmp_path / "a" / file).write_bytes(data)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        load_mixlora(tmp_path / "a")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"r": 1, "r": 2}', b"\xff", b"[" * 100_000])
def test_a_broken_config_is_named(tmp_path: Path, data: bytes) -> None:
    save_adapter(tmp_path / "a", tensors_of(), config_of())
    (tmp_path / "a" / "adapter_config.json").write_bytes(data)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_mixlora(tmp_path / "a")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read"):
        load_mixlora(tmp_path)
    save_adapter(tmp_path / "a", tensors_of(), config_of())
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        load_mixlora(tmp_path / "a")
