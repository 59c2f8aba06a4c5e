"""What of an adapter goes between the server and a client, by the client's and the server's own functions, without a training between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hecate.adapters.folder import save_adapter
from hecate.adapters.sets.sums import kept_numbers
from hecate.apps.federate.client import ClientPlan, Described, peft_tensors, receive, send, write_message
from hecate.apps.federate.codec import HEADER_BYTES, decode, encode
from hecate.apps.federate.section.settings import RoundsConfig, ServerConfig
from hecate.apps.federate.server import received, stepped
from hecate.apps.federate.server_optimizer import ServerState
from hecate.apps.federate.vectors import PairSite, VectorShape, flat, pairs_of, read_pairs

SITES = (
    PairSite("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 6, 10),
    PairSite("model.layers.1.mlp.down_proj", 1, "mlp.down_proj", 10, 6),
)
DESCRIBED = Described("base", 8, False, ("up_proj", "down_proj"))


def shape_of(*, trains_a: bool = True, dtype: str = "float32") -> VectorShape:
    return VectorShape(SITES, 4, 2.0, trains_a, dtype, 0)


def drawn(shape: VectorShape, seed: int) -> Tensor:
    return torch.randn(shape.numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(shape.torch_dtype)


def masked(vector: Tensor, density: float) -> Tensor:
    kept = torch.zeros_like(vector)
    largest = vector.abs().topk(kept_numbers(density, len(vector))).indices
    kept[largest] = vector[largest]
    return kept


def plan_of(folder: Path, shape: VectorShape, density: float, *, kept_before: Path | None = None, keeps: Path | None = None) -> ClientPlan:
    return ClientPlan(
        name="gcd",
        shape=shape,
        described=DESCRIBED,
        begin=str(folder / "begin"),
        down=str(folder / "gcd.down"),
        merging=None,
        up=str(folder / "gcd.up"),
        density=density,
        kept_before=None if kept_before is None else str(kept_before),
        keeps=None if keeps is None else str(keeps),
    )


def round_of(plan: ClientPlan, server: Tensor, down: float, change: Tensor) -> tuple[Tensor, Tensor]:
    """What the client begins with, and what the server sees of what it has become: of a training that adds `change`."""
    assert plan.down is not None
    write_message(plan.down, encode(server, down))
    receive(plan)
    begun = flat(read_pairs(Path(plan.begin), plan.shape), plan.shape)
    trained = Path(plan.begin).with_name("trained")
    save_adapter(trained, peft_tensors(pairs_of(begun + change, plan.shape)), DESCRIBED.of_rank(4))
    send(plan, trained)
    return begun, flat(received(plan, server), plan.shape)


@pytest.mark.parametrize("trains_a", [True, False])
def test_a_client_gets_the_servers_largest_numbers_and_sends_its_largest_changes(tmp_path: Path, trains_a: bool) -> None:
    shape = shape_of(trains_a=trains_a)
    server, change = drawn(shape, 1), drawn(shape, 2) / 8
    plan = plan_of(tmp_path, shape, 0.1)
    begun, seen = round_of(plan, server, 0.25, change)
    assert torch.equal(begun, masked(server, 0.25))
    sent = masked((begun + change) - begun, 0.1)  # as rounded by the training
    assert torch.equal(seen, server + sent)
    assert int((seen != server).sum()) == kept_numbers(0.1, shape.numel)
    kept = kept_numbers(0.1, shape.numel)
    assert Path(plan.up).stat().st_size == HEADER_BYTES + -(-shape.numel // 8) + 4 * kept


def test_with_density_1_nothing_is_lost_to_the_bit(tmp_path: Path) -> None:
    shape = shape_of(dtype="float64")
    server, change = drawn(shape, 1).float().double(), drawn(shape, 2).float().double()
    begun, seen = round_of(plan_of(tmp_path, shape, 1.0), server, 1.0, torch.zeros_like(change))
    assert torch.equal(begun, server)
    assert torch.equal(seen, server)
    (tmp_path / "b").mkdir()
    assert torch.equal(round_of(plan_of(tmp_path / "b", shape, 1.0), torch.zeros_like(server), 1.0, change)[1], change)


def test_what_was_not_sent_is_added_to_the_next_changes(tmp_path: Path) -> None:
    shape, kept = shape_of(), tmp_path / "kept" / "gcd"
    server, first, second = torch.zeros(shape.numel), drawn(shape, 2), drawn(shape, 3)
    folders = [tmp_path / "1", tmp_path / "2"]
    _, seen = round_of(plan_of(folders[0], shape, 0.25, keeps=kept), server, 1.0, first)
    rest = first - masked(first, 0.25)
    assert torch.equal(decode(kept.read_bytes(), shape.numel), rest)
    _, again = round_of(plan_of(folders[1], shape, 0.25, kept_before=kept), seen, 1.0, second)
    sent = again - seen
    torch.testing.assert_close(sent, masked(second + rest, 0.25), rtol=1e-5, atol=1e-6)
    assert not torch.equal(sent != 0, masked(second, 0.25) != 0), "what was kept has changed nothing"


def test_rounds_of_the_servers_adamw_are_steps_of_torch_by_the_weighted_mean_of_sparse_changes(tmp_path: Path) -> None:
    shape, rounds = shape_of(dtype="float64"), RoundsConfig(server=ServerConfig(optimizer="adamw", learning_rate=0.01, weight_decay=0.1))
    weights, state = [0.7, 0.3], ServerState(drawn(shape, 1).float().double())
    parameter = nn.Parameter(state.vector.clone())
    reference = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    for number in range(3):
        changes = [drawn(shape, 10 * number + client).float().double() for client in (2, 3)]
        adapters = {}
        for client, change in enumerate(changes):
            plan = plan_of(tmp_path / f"{number}-{client}", shape, 0.1)
            _, seen = round_of(plan, torch.zeros_like(change), 1.0, change)
            adapters[f"c{client}"] = pairs_of(state.vector + seen, shape)
        state = stepped(state, adapters, shape, weights, rounds)
        parameter.grad = -sum((weight * masked(change, 0.1) for weight, change in zip(weights, changes, strict=True)), torch.zeros(1))
        reference.step()
        torch.testing.assert_close(state.vector, parameter.detach(), rtol=1e-12, atol=1e-12)


def test_a_message_that_another_adapter_wrote_is_refused(tmp_path: Path) -> None:
    shape = shape_of()
    plan = plan_of(tmp_path, shape, 1.0)
    write_message(plan.up, encode(drawn(shape_of(trains_a=False), 1), 1.0))
    with pytest.raises(ValueError, match=f"is of 64 numbers, and {shape.numel} are expected"):
        received(plan, None)
    assert replace(shape, trains_a=False).numel == 64
