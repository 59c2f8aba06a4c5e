"""What a whole run on one rank does once, and which of its errors count as the loss of another rank."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hecate.config import load_config
from hecate.elastic.rebuild import Membership
from hecate.model import gated_ffn
from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.comm.aborts import AbortedError
from hecate.ranks.ranks import loss_in_words, lost_a_peer
from hecate.train.loop import train
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import ranks_of_default_group

ONE_STEP = ("max_steps=1", "data.eval=[]", "eval.generate=false")
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def fail_in_step_one(rank: int, world: int, workshop: str, text: str, aborts: bool) -> tuple[str, int]:
    """Train one step, in which such an error is raised; what `train` raises, and how often it has asked for the next group.

    Args:
        aborts: the groups are aborted just before, and the error is none of torch.distributed.
    """
    membership = mock.create_autospec(Membership, instance=True)
    membership.next_group.return_value = None
    name = "".join(filter(str.isalnum, text))[:8]
    config = load_config(f"{workshop}/config.yaml", [*ONE_STEP, f"output_dir={workshop}/runs/{name}"], claim_output=False)
    ranks = ranks_of_default_group(rank, world)

    def fail(*arguments: object, **named: object) -> float:
        if aborts:
            ranks.abort()
            raise ValueError(text)
        raise RuntimeError(text)

    with mock.patch.object(ExpertOptimizer, "squares", fail):
        try:
            train(config, ranks, membership)
        except (RuntimeError, ValueError) as error:
            return str(error), membership.next_group.call_count
    return "", membership.next_group.call_count


@pytest.mark.parametrize(
    ("text", "aborts", "asked"),
    [
        (GLOO, False, 1),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False, 0),
        ("Default process group has not been initialized", True, 1),
    ],
)
def test_only_the_loss_of_a_peer_makes_a_run_ask_for_another_group(workshop: str, text: str, aborts: bool, asked: int) -> None:
    """A mistake of this rank's own, such as a wrong shape, ends the run with its own text. After an abort any error may be of it."""
    assert run_ranks(1, fail_in_step_one, workshop, text, aborts) == [(text, asked)]


def test_what_says_that_a_peer_is_lost() -> None:
    assert lost_a_peer(RuntimeError(GLOO))
    assert lost_a_peer(dist.DistNetworkError("Connection reset"))
    assert lost_a_peer(AbortedError("the groups were aborted"))
    assert not lost_a_peer(RuntimeError("CUDA error: device-side assert triggered"))
    assert not lost_a_peer(torch.OutOfMemoryError("out of memory"))
    assert not lost_a_peer(ValueError(GLOO))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GLOO, "another rank closed its connection"),
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation", "another rank did not answer in time"),
        ("[gloo/transport/tcp/pair.cc:9] something new", "[gloo/transport/tcp/pair.cc:9] something new"),
        ("the process groups were aborted\nat all", "the process groups were aborted"),
        ("", "RuntimeError"),
    ],
)
def test_the_loss_of_a_peer_in_words(text: str, words: str) -> None:
    assert loss_in_words(RuntimeError(text)) == words


def modules_tried(rank: int, world: int, workshop: str, family: str) -> int:
    """Modules of which a whole run, from loading to export, has tried whether they are gated FFNs."""
    overrides = [*ONE_STEP, f"moe.family={family}", f"output_dir={workshop}/runs/{family}"]
    config = load_config(f"{workshop}/config.yaml", overrides, claim_output=False)
    with mock.patch.object(gated_ffn, "_describe", wraps=gated_ffn._describe) as describe:
        assert train(config, ranks_of_default_group(rank, world))
    return describe.call_count


@pytest.mark.parametrize("family", ["mixlora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_looks_for_a_models_ffns_once(workshop: str, family: str) -> None:
    assert run_ranks(1, modules_tried, workshop, family) == [2], "the model has two layers with one FFN each"


def adapter_without_decay_of(rank: int, world: int, workshop: str, kinds: str) -> dict[str, torch.Tensor]:
    """The adapter after one step with weight decay, of which such kinds of parameters are excluded."""
    folder = f"{workshop}/runs/decay-{len(kinds)}"
    overrides = [*ONE_STEP, "weight_decay=0.5", f"weight_decay_exclude={kinds}", f"output_dir={folder}"]
    assert train(load_config(f"{workshop}/config.yaml", overrides, claim_output=False), ranks_of_default_group(rank, world))
    return load_file(f"{folder}/adapter/adapter_model.safetensors")


@pytest.mark.slow
def test_the_configuration_says_what_does_not_decay(workshop: str) -> None:
    (none,), (routers,) = (run_ranks(1, adapter_without_decay_of, workshop, kinds) for kinds in ("[]", "[routers]"))
    changed = {name for name in none if not torch.equal(none[name], routers[name])}
    assert len(changed) == 2, changed  # one router a layer
    assert all("moe_gate" in name for name in changed), changed
