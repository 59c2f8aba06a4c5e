"""Whole trainings on mock GPUs: the losses are the CPU's, and the host waits where a table says, and nowhere else.

Wrong devices, reads of memory that nothing has written, and tensors of the host in collectives or kernels are errors of the mock device.
What a real GPU does besides is not shown: streams beside each other, NCCL, the kernels' machine code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from testing.tiny_run import make_workshop, save_random_llama
from tests.mock_cuda.runs import Runs, do

STEPS = 4
QUIET = {
    "eval.on_start": "false",
    "eval.generate": "false",
    "data.eval": "[]",
    "max_steps": STEPS,
    "kernels": "torch",
    "lora.dropout": 0.1,
}
TWO_NODES = (
    "nodes: [{devices: 2, flops: 1e9, memory: 1e9}, {devices: 2, flops: 1e9, memory: 1e9}]\n"
    "intra_node: {bandwidth: 1e9, latency: 1e-6}\ninter_node: {bandwidth: 1e7, latency: 1e-5}\n"
)
ONE_NODE = "nodes: [{devices: 4, flops: 1e9, memory: 1e9}]\nintra_node: {bandwidth: 1e6, latency: 1e-9}\n"

SEVERAL_RANKS: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "static_ep": ("fssdp.policy=static_ep",),
        "full": ("fssdp.policy=full", "data.packing=false"),
        "auto-exact": ("fssdp.plan=exact",),
        "hecate-calibrated": ("fssdp.policy=hecate", "fssdp.plan=calibrated"),
        "rematerialize": ("fssdp.rematerialize=true", "gradient_checkpointing=true", "fssdp.prefetch=2"),
        "flex-evaluated": (
            "model.name_or_path={folder}/wide",
            "data.eval={folder}/up.eval.jsonl",
            "eval.on_start=true",
            "eval.generate=true",
            "eval.max_new_tokens=2",
        ),
        "full-experts": ("moe.family=full", "moe.upcycle_noise=0.1", "fssdp.policy=static_ep"),
    },
    4: {
        "groups": ("fssdp.shard_size=2", "micro_batch_size=1"),
        "backups": ("fssdp.redundancy=1", "micro_batch_size=1"),
        "over-leaders": ("topology={folder}/two_nodes.yaml", "fssdp.policy=full", "micro_batch_size=1"),
        "in-slices": ("topology={folder}/one_node.yaml", "fssdp.policy=full", "micro_batch_size=1", "moe.num_experts=1", "moe.top_k=1"),
    },
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    # Flex attention needs heads of 16 elements.
    save_random_llama(
        folder / "wide", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    (folder / "two_nodes.yaml").write_text(TWO_NODES, encoding="utf-8")
    (folder / "one_node.yaml").write_text(ONE_NODE, encoding="utf-8")
    return folder


def on_both(workshop: Path, world: int, cases: dict[str, tuple[str, ...]], **on_mock: str) -> tuple[Runs, Runs]:
    """The same runs on mock GPUs and on the CPU.

    Args:
        on_mock: keys that have these values on mock GPUs only.
    """
    overrides = {}
    for case, changes in cases.items():
        changed = QUIET | dict(one.format(folder=workshop).split("=", 1) for one in changes)
        overrides[case] = [f"{key}={value}" for key, value in changed.items()]
    cpu = Runs(str(workshop / "config.yaml"), str(workshop / f"cpu{world}"), world, False, overrides)
    differing = {case: [line for line in lines if line.split("=")[0] not in on_mock] for case, lines in overrides.items()}
    for lines in differing.values():
        lines.extend(f"{key}={value}" for key, value in on_mock.items())
    return do(replace(cpu, folder=str(workshop / f"mock{world}"), mock=True, overrides=differing)), do(cpu)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_losses_are_those_of_the_cpu(workshop: Path, world: int) -> None:
    mock, cpu = on_both(workshop, world, SEVERAL_RANKS[world])
    for case in SEVERAL_RANKS[world]:
        assert len(mock.losses(case)) == STEPS
        for got, wanted in zip(mock.losses(case), cpu.losses(case), strict=True):
            assert got == pytest.approx(wanted, rel=1e-6), case


def test_the_host_waits_in_few_places(workshop: Path) -> None:
    """One rank, Triton kernels (interpreted). Two layers, one micro-step: nothing waits for a layer, for the batch or its attention."""
    small = ("model.name_or_path={folder}/wide", "micro_batch_size=1", "data.seq_len=40", "gradient_accumulation_steps=1", "max_steps=3")
    mock, cpu = on_both(workshop, 1, {"triton": small}, kernels="triton")
    for got, wanted in zip(mock.losses("triton"), cpu.losses("triton"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    (step,) = mock.steps("triton", rank=0)
    assert {"shrink_kernel", "gated_kernel", "outer_kernel"} <= set(step["launches"]), "Triton kernels did not run"
    assert step["launches"]["flex_attention"] == 2, "a layer's attention was computed in another way"
    assert "H2D pageable" not in step["kinds"]
    assert "hecate: topology: 1 x Mock H100 on 1 node" in mock.log(rank=0)
    assert "does not know the card 'Mock H100'" in mock.log(rank=0), "topology: auto did not read the device's name"
    assert "peak GPU memory, reserved" in mock.log(rank=0)
    assert "hecate: topology:" not in cpu.log(rank=0)
    assert step["waits"] == {
        "parallel/comm/host_read.py:get": 1,
        "hecate/train/step_totals.py:exchange_totals": 1,
    }
