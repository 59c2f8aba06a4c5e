"""Kinds of files that come with models: checkpoints, adapters of every form, and the headers of base models."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecate.adapters.folder import CONFIG, OLD_WEIGHTS, WEIGHTS, save_adapter
from hecate.adapters.formats.linears import LinearsDescription
from hecate.adapters.mixlora.description import MixLoraDescription, expected_shapes, load_mixlora
from hecate.adapters.peft.description import LoraDescription
from hecate.adapters.peft.per_expert import PLAIN, split_experts
from hecate.adapters.sets.set_files import read_set
from hecate.apps.check.drill.cases.saves import load, save
from hecate.checkpoint.manifest import COMMIT, MANIFEST, Manifest, commit_line
from hecate.checkpoint.meta import config_values, owners_of
from hecate.checkpoint.survey import contents, survey
from hecate.checkpoint.train_state import state_of
from hecate.io.strict_json import JsonError, parse_json
from hecate.model.files.load import ModelSource
from hecate.model.files.model_digest import model_digest
from hecate.model.files.safetensors_headers import INDEX, SINGLE, stored_tensors
from hecate.model.files.tensor_shapes import model_config, tensor_shapes
from tests.attacks.fuzz.file_kinds import FileKind

_BASE = "no-such-base"
_STEP = "checkpoint-3"
_SHARD = "rank-00000-of-00002.safetensors"


def _checkpoint(folder: Path) -> None:
    save(folder, 3, 3.0)


def _load_checkpoint(folder: Path) -> None:
    survey(folder)
    contents(folder / _STEP)
    load(folder / _STEP)


def _commit(folder: Path) -> None:
    """Make COMMIT fit to a changed manifest; not where a pipe or a folder has its place."""
    manifest = folder / _STEP / MANIFEST
    if manifest.is_file() and not manifest.is_symlink() and manifest.stat().st_size < 2**20:
        (folder / _STEP / COMMIT).write_bytes(commit_line(manifest.read_bytes()))


def _drawn(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def write_mixture(folder: Path) -> None:
    config = MixLoraDescription(
        base_model_name_or_path=_BASE,
        r=2,
        alpha=4,
        dropout=0.0,
        target_modules=("q_proj", "gate_proj", "up_proj", "down_proj"),
        num_layers=2,
        num_experts=3,
        top_k=2,
        act_fn="silu",
        extra={"router": "softmax", "router_aux_loss_coef": 0.01},
    )
    sizes = {"hidden": 4}
    tensors = {
        name: _drawn(*(size if isinstance(size, int) else sizes.get(size, 6) for size in shape)) for name, shape in expected_shapes(config)
    }
    save_adapter(folder / "adapter", tensors, config)


def _mixlora_bin(folder: Path) -> None:
    write_mixture(folder)
    tensors, _ = load_mixlora(folder / "adapter")
    (folder / "adapter" / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter" / OLD_WEIGHTS)


def _peft(**more: Any) -> LoraDescription:
    given: dict[str, Any] = {"base_model_name_or_path": _BASE, "r": 2, "alpha": 4, "use_rslora": False, "target_modules": ("q_proj",)}
    return LoraDescription(**(given | {"target_parameters": ()} | more))


def _linear_pairs() -> dict[str, Tensor]:
    at = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    return {at.format(layer, matrix): _drawn(*shape) for layer in (0, 1) for matrix, shape in (("A", (2, 4)), ("B", (6, 2)))}


def write_lora(folder: Path) -> None:
    save_adapter(folder / "adapter", _linear_pairs(), _peft())


def _lora_of_ranks(folder: Path) -> None:
    """With patterns of ranks, as PEFT may have them."""
    write_lora(folder)
    path = folder / "adapter" / CONFIG
    value = json.loads(path.read_bytes()) | {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {".*q_proj": 8}}
    path.write_text(json.dumps(value), encoding="utf-8")


def _expert_pairs() -> dict[str, Tensor]:
    """Of three experts with hidden size 4 and an inner size of 5."""
    at = "base_model.model.model.layers.0.mlp.experts"
    shapes = {"base_layer.lora_A": (6, 4), "base_layer.lora_B": (10, 6), "lora_A": (6, 5), "lora_B": (4, 6)}
    return _linear_pairs() | {f"{at}.{name}.weight": _drawn(*shape) for name, shape in shapes.items()}


_PARAMETERS = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")


def _moe_lora(folder: Path) -> None:
    save_adapter(folder / "adapter", _expert_pairs(), _peft(target_parameters=_PARAMETERS))


def _per_expert(folder: Path) -> None:
    tensors, config = split_experts(_expert_pairs(), _peft(target_parameters=_PARAMETERS), PLAIN)
    save_adapter(folder / "adapter", tensors, config)


def _experts_of_linears(folder: Path) -> None:
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    pairs = {f"{at}.lora_{matrix}_{number}.weight": _drawn(*shape) for number in (0, 1) for matrix, shape in (("A", (2, 4)), ("B", (6, 2)))}
    config = LinearsDescription(
        base_model_name_or_path=_BASE,
        r=2,
        alpha=4,
        use_rslora=False,
        target_modules=("q_proj",),
        experts_per_layer=(2, 0),
        top_k=1,
        dropout=0.0,
        router_aux_loss_coef=0.01,
    )
    save_adapter(folder / "adapter", pairs | {f"{at}.router.router.weight": _drawn(2, 4)}, config)


def _read_adapter(folder: Path) -> None:
    found = read_set(folder / "adapter")
    for module in found.sizes:
        found.read(module)


_META = {
    "config": "model: {name_or_path: a}\nmax_steps: 6\n",
    "base_model": "ab",
    "drawn": "",
    "step": 3,
    "tokens": 100,
    "skipped": 0,
    "skipped_in_a_row": 0,
    "rows_per_step": 4,
    "grad_norms": [1.0, 2.5],
    "owners": {"0": [0, 1, 0], "1.q_proj": [1, 1]},
    "history": [{"0": [[1, 2, 3], [4, 5, 6]], "1.q_proj": [[1, 2], [3, 4]]}],
    "stream": {"identity": {}, "mixture": {}, "waiting": [[0, 1]], "rows": 3},
}


def _meta(folder: Path) -> None:
    (folder / "meta.json").write_text(json.dumps(_META), encoding="utf-8")


def _read_meta(folder: Path) -> None:
    """As a resume reads it, before it opens tensors."""
    try:
        manifest = Manifest(3, 2, {}, parse_json((folder / "meta.json").read_bytes()))
    except JsonError:
        return  # the manifest as a whole is another kind
    state_of(folder, manifest)
    owners_of(folder, manifest)
    config_values(folder, manifest.meta)


_ADAPTERS: dict[str, Callable[[Path], None]] = {
    "a mixture over FFNs": write_mixture,
    "a LoRA": write_lora,
    "a LoRA with patterns of ranks": _lora_of_ranks,
    "a LoRA of experts": _moe_lora,
    "a LoRA of experts, one by one": _per_expert,
    "experts over linears": _experts_of_linears,
}


def _base(folder: Path) -> None:
    """A base model in two files."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2}', encoding="utf-8")
    names = {"model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    for name, file in names.items():
        save_file({name: _drawn(3, 4)}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": names}), encoding="utf-8")


def _single(folder: Path) -> None:
    _base(folder)
    (folder / INDEX).unlink()
    (folder / "b.safetensors").unlink()
    (folder / "a.safetensors").rename(folder / SINGLE)


def _read_headers(folder: Path) -> None:
    stored_tensors(folder)
    model_digest(ModelSource(folder, None))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(folder: Path) -> None:
    keys = _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
    keys += _text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b")
    keys += _text("llama.block_count") + struct.pack("<II", 4, 1)
    tensors = b"".join(
        _text(name) + struct.pack("<IQQIQ", 2, 4, 3, 0, 0) for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight")
    )
    (folder / "model.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 3, 3) + keys + tensors + bytes(200))


KINDS = (
    FileKind(name="checkpoint, manifest", file=MANIFEST, write=_checkpoint, read=_load_checkpoint, form="json", closed=True, forge=_commit),
    FileKind(name="checkpoint, manifest and old COMMIT", file=MANIFEST, write=_checkpoint, read=_load_checkpoint, form="json", closed=True),
    FileKind(name="checkpoint, COMMIT", file=COMMIT, write=_checkpoint, read=_load_checkpoint, closed=True),
    FileKind(name="checkpoint, tensors", file=_SHARD, write=_checkpoint, read=_load_checkpoint, form="safetensors", closed=True),
    FileKind(name="checkpoint, what its run says", file="meta.json", write=_meta, read=_read_meta, form="json", is_file=False),
    *(
        FileKind(name=f"adapter, {name}, {part}", file=file, write=write, read=_read_adapter, form=form)
        for name, write in _ADAPTERS.items()
        for part, file, form in (("description", CONFIG, "json"), ("tensors", WEIGHTS, "safetensors"))
    ),
    FileKind(name="adapter, a mixture over FFNs, .bin", file=OLD_WEIGHTS, write=_mixlora_bin, read=_read_adapter, closed=True),
    FileKind(name="base model, index", file=INDEX, write=_base, read=_read_headers, form="json", closed=True),
    FileKind(name="base model, safetensors", file=SINGLE, write=_single, read=_read_headers, form="safetensors", closed=True),
    FileKind(name="base model, sizes", file="config.json", write=_base, read=lambda folder: model_config(folder), form="json", closed=True),
    FileKind(
        name="base model, GGUF", file="model.gguf", write=_gguf, read=lambda folder: tensor_shapes(folder / "model.gguf"), closed=True
    ),
)
