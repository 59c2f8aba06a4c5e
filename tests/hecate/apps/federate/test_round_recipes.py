"""Whole runs of the recipes of CELLM and of FFA-LoRA's private rounds, with a tiny model in place of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecate.adapters.sets.sums import kept_numbers
from hecate.apps.federate.before_round import SERVER_STATE
from hecate.apps.federate.codec import HEADER_BYTES, decode
from hecate.apps.federate.privacy.accountant import privacy_spent
from hecate.apps.federate.records import RoundRecord, read_rounds
from hecate.apps.federate.server_optimizer import load_server
from testing.tiny_run import make_workshop
from tests.hecate.train.command_line import run

RECIPES = Path(__file__).parents[4] / "configs" / "recipes"
LAYERS, OF_B = 2, {"gate_proj": 48, "up_proj": 48, "down_proj": 32}
"""of the tiny Llama: how many outputs its linears have"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def federated(workshop: Path, recipe: str, name: str, *overrides: str, count: int = 2) -> tuple[list[RoundRecord], Path]:
    """Nothing is evaluated, which takes as long as a training does."""
    clients = ",".join(f"{{data: {workshop}/{one}.train.jsonl, name: {one}}}" for one in ("up", "echo"))
    small = [f"model={{name_or_path: {workshop}/model, dtype: float64}}", "data.seq_len=64", "nproc=1", f"rounds.clients=[{clients}]"]
    out = workshop / "runs" / name
    run("federate", RECIPES / recipe, *small, f"rounds.count={count}", "rounds.local_steps=3", f"output_dir={out}", *overrides)
    return read_rounds(out), out


def messages_of(out: Path, kind: str) -> dict[str, bytes]:
    return {f"{path.parts[-3]}/{path.stem}": path.read_bytes() for path in sorted(out.glob(f"round-*/messages/*.{kind}"))}


def test_cellm_moves_a_tenth_of_the_numbers_and_says_how_many_bytes_that_is(workshop: Path) -> None:
    records, out = federated(workshop, "cellm.yaml", "cellm")
    numel = LAYERS * 16 * sum(OF_B.values())
    kept = kept_numbers(0.1, numel)
    expected = HEADER_BYTES + numel // 8 + 8 * kept
    for record in records:
        for kind, said in (("down", record.bytes_down), ("up", record.bytes_up)):
            sent = {name: message for name, message in messages_of(out, kind).items() if name.startswith(f"round-{record.round}/")}
            assert said == {name.rpartition("/")[2]: len(message) for name, message in sent.items()}
            assert said == dict.fromkeys(("up", "echo"), expected)
            assert all(int(decode(message, numel).count_nonzero()) <= kept for message in sent.values())
    down = messages_of(out, "down")
    assert not decode(down["round-1/up"], numel).any()
    assert decode(down["round-2/up"], numel).count_nonzero() == kept
    assert down["round-1/up"] == down["round-1/echo"] != down["round-2/up"]
    server = load_server(out / "round-2" / SERVER_STATE).vector
    assert server.count_nonzero() > kept
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    left = torch.cat([adapter[name].flatten() for name in sorted(adapter) if "lora_B" in name])
    assert left.count_nonzero() == kept
    assert torch.equal(left[left != 0].abs().sort().values, server.abs().topk(kept).values.sort().values)


def test_private_clients_send_the_same_together_and_apart(workshop: Path) -> None:
    """The noise is a client's own, in each round another; averaging B is exact; epsilon is that of all rounds so far."""
    together, out = federated(workshop, "ffa_rounds.yaml", "together")
    apart, alone = federated(workshop, "ffa_rounds.yaml", "apart", "rounds.isolation=process")
    numel = LAYERS * 8 * sum(OF_B.values())
    ours, theirs = messages_of(out, "up"), messages_of(alone, "up")
    assert ours.keys() == theirs.keys() == {f"round-{number}/{name}" for number in (1, 2) for name in ("up", "echo")}
    for name, message in ours.items():
        torch.testing.assert_close(decode(message, numel), decode(theirs[name], numel), rtol=1e-10, atol=1e-10)
    assert max(record.aggregation_error for record in (*together, *apart)) < 1e-12
    for record in together:
        for spent in record.privacy.values():
            assert spent == privacy_spent(noise=0.5, delta=1e-5, samples=120, samples_per_step=4, steps=3 * record.round)
    noisy, _ = federated(workshop, "ffa_rounds.yaml", "silent", "privacy.noise=0", count=1)
    assert not noisy[0].privacy
    without = decode(messages_of(workshop / "runs" / "silent", "up")["round-1/up"], numel)
    assert not torch.allclose(without, decode(ours["round-1/up"], numel), rtol=0.1)
