"""A run whose experts are mixed by users, from its recipe to its adapter, and what is done with that: eval, generate, one user's LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from hecate.apps.answers.bake_user import bake_user
from hecate.apps.answers.checkpointed import write_checkpointed
from hecate.apps.answers.opened import with_adapter
from hecate.apps.answers.trained import bake
from hecate.apps.foresee.dry_run import forecast
from hecate.config import Config, load_config
from hecate.data.files.user_features import read_user_features
from hecate.errors import UserError
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_users import users_of_rows
from hecate.model.base import BaseChoice
from hecate.model.sizes.run_shape import run_shape
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.preflight import check_data
from hecate.train.training import Training
from testing.answering import answer, evaluate_trained
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.command_line import records, run
from tests.hecate.train.in_process import train_until

RECIPE = Path(__file__).parents[3] / "configs" / "recipes" / "reclora.yaml"
WIDTH = 5
SIZES = ("data.seq_len=64", "micro_batch_size=2", "moe.num_experts=3", "max_steps=4", "learning_rate=1e-2", "gradient_accumulation_steps=2")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With texts of four users, of whom two answer in capitals."""
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    for name, first in (("train", 0), ("eval", 200)):
        lines = []
        for number in range(first, first + (120 if name == "train" else 6)):
            word = f"w{number % 13}x{number}"
            reply = word.upper() if number % 4 < 2 else word
            turns = [{"role": "user", "content": word}, {"role": "assistant", "content": reply}]
            lines.append(json.dumps({"user": f"u{number % 4}", "messages": turns}))
        (folder / f"users.{name}.jsonl").write_text("\n".join(lines) + "\n")
    values = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    np.savez(folder / "users.npz", ids=np.array([f"u{number}" for number in range(4)]), features=values)
    np.savez(folder / "wide.npz", ids=np.array(["u0", "u1", "u2", "u3"]), features=np.ones((4, 7)))
    return folder


def given(workshop: Path, name: str, *more: str) -> list[str]:
    data = [f"data.train=[{workshop}/users.train.jsonl]", f"data.eval=[{workshop}/users.eval.jsonl]", f"data.features={workshop}/users.npz"]
    mine = [f"model.name_or_path={workshop}/model", "model.dtype=float32", *data, f"output_dir={workshop}/runs/{name}", *SIZES, *more]
    return [f"{key}={value}" for key, value in dict(one.split("=", 1) for one in mine).items()]


def loaded(workshop: Path, name: str, *more: str) -> Config:
    return load_config(RECIPE, given(workshop, name, *more), claim_output=False)


def alone(group: dist.ProcessGroup) -> Ranks:
    return Ranks(0, 1, torch.device("cpu"), ExpertGroups(group, group))


def test_a_plan_has_all_experts_everywhere_under_every_policy_and_counts_the_gates(workshop: Path) -> None:
    """2 layers of q [32, 32] and v [16, 32], 3 experts of rank 8; gates of 5 numbers."""
    shape = run_shape(loaded(workshop, "plan", "moe.router.mix=factors"), None, 2)
    assert shape.config.moe.experts_per_token == 3
    assert shape.replicated_parameters == 4 * (2 * WIDTH + 60 * (WIDTH + 1) + 3 * 61)
    assert all(one.parts["tokens"] == 0 for one in forecast(shape, "zipf").policies)
    products = run_shape(loaded(workshop, "plan"), None, 2)
    by_policy = {one.policy: one.parts["tokens"] for one in forecast(products, "zipf").policies}
    assert by_policy["static_ep"] > 0 == by_policy["full"]


@pytest.mark.parametrize("mix", ["factors", "products"])
def test_from_recipe_to_one_users_lora(workshop: Path, one_rank: dist.ProcessGroup, mix: str) -> None:
    """Trained, evaluated, exported; applied again; and for one user an ordinary LoRA that PEFT reads, with the same logits."""
    import peft
    from transformers import AutoModelForCausalLM

    router = "moe.router.temperature=5", f"moe.router.mix={mix}"
    ranks, config = alone(one_rank), loaded(workshop, mix, *router, "moe.num_experts=[3,0]", "eval.generate=true")
    training = Training(config, ranks)
    losses = [training.train_one().result.loss for _ in range(4)]
    assert losses[-1] < losses[0]
    scores = training.evaluate().scores["users.eval"]
    assert scores.accuracy is not None
    folder = training.parts.output.replace(workshop / "runs" / mix, training.parts.moe, ranks)
    saved = training.save().folder
    assert saved is not None
    of_checkpoint = load_file(write_checkpointed(saved, workshop / mix, ranks) / "adapter_model.safetensors")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(of_checkpoint.pop(name), tensor) for name, tensor in tensors.items())
    assert not of_checkpoint
    for name in tensors:  # trained longer, the users would differ more
        if name.endswith("router.router.out.weight"):
            tensors[name] = tensors[name] * 300
    save_file(tensors, folder / "adapter_model.safetensors")

    users = read_user_features(workshop / "users.npz")
    base, moe = with_adapter(folder, ranks, BaseChoice(dtype="float32"))
    ids = torch.arange(20).expand(2, 20)
    tokens = PassTokens(users=users_of_rows(torch.from_numpy(users.values_UF), torch.tensor([1, 2])))
    with moe.engine.evaluation() as evaluation, torch.no_grad(), evaluation.forward(tokens):
        mixed = base.model(input_ids=ids).logits
    assert not torch.allclose(mixed[0], mixed[1], rtol=1e-3, atol=1e-4), "the user makes no difference"
    for row, user in enumerate(("u1", "u2")):
        bake(folder, folder.with_name(user), user, workshop / "users.npz")
        plain = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float32)
        lora = peft.PeftModel.from_pretrained(plain, folder.with_name(user))
        with torch.no_grad():
            torch.testing.assert_close(lora(input_ids=ids[row : row + 1]).logits[0], mixed[row], rtol=1e-4, atol=1e-5)
    assert json.loads((folder.with_name("u1") / "adapter_config.json").read_text())["r"] == (8 if mix == "factors" else 24)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"user": None, "features": None}, r"--user ID and --features FILE\.npz"),
    ({"user": "u1", "features": None}, r"--user was given without --features FILE\.npz"),
    ({"user": "u9", "features": "users.npz"}, r"user 'u9' has no features in .*\n  it has 4 users: u0, u1, u2, u3"),
    ({"user": "u1", "features": "wide.npz"}, "its gates were trained for users of 5 numbers, but the features have 7"),
]


@pytest.mark.slow
def test_whole_commands(workshop: Path) -> None:
    """On two ranks, where both have samples of each user; then with and without the user in question."""
    run("train", RECIPE, *given(workshop, "whole", "nproc=2", "fssdp.policy=static_ep"))
    steps = records(workshop, "whole", "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    folder, file = workshop / "runs" / "whole" / "adapter", workshop / "users.npz"
    assert run("generate", folder, "w1x1", "--user", "u1", "--features", file, "--max-new-tokens", "3").returncode == 0
    run("eval", RECIPE, *given(workshop, "whole"))
    run("export", folder, workshop / "baked", "--user", "u1", "--features", file)
    assert (workshop / "baked" / "adapter_config.json").exists()


def test_what_needs_a_user_is_refused_without_one(workshop: Path, one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    import hecate.apps.answers.inference as inference

    ranks = alone(one_rank)

    @contextmanager
    def joined() -> Any:
        yield ranks

    monkeypatch.setattr(inference, "join_ranks", joined)
    training = Training(loaded(workshop, "refusing"), ranks)
    folder = training.parts.output.replace(workshop / "runs" / "refusing", training.parts.moe, ranks)
    for arguments, reason in REFUSED:
        chosen = {name: workshop / value if name == "features" and value else value for name, value in arguments.items()}
        with pytest.raises(UserError, match=reason):
            answer(folder, "w1", system=None, model=None, max_new_tokens=2, **chosen)
    with pytest.raises(UserError, match=r"say in which form.*\n.*another LoRA: give --user ID and --features"):
        bake(folder, workshop / "out", None, None)
    with pytest.raises(UserError, match="its gates were trained for users of 5 numbers, but the features have 7"):
        bake(folder, workshop / "out", "u1", workshop / "wide.npz")
    with pytest.raises(UserError, match="its gates were trained for users of 5 numbers, but the features have 7"):
        evaluate_trained(loaded(workshop, "refusing", f"data.features={workshop}/wide.npz"), folder)
    with pytest.raises(UserError, match=r"lora\.init_from: .* has data\.features, whose width is 5, but the configuration has 7"):
        Training(loaded(workshop, "begun", f"data.features={workshop}/wide.npz", f"lora.init_from={folder}"), ranks)
    mola = [f"data.train=[{workshop}/up.train.jsonl]", "data.eval=[]", f"output_dir={workshop}/runs/mola", "moe.unit=linear"]
    others = Training(load_config(workshop / "config.yaml", [*mola, "eval.generate=false"], claim_output=False), ranks)
    theirs = others.parts.output.replace(workshop / "runs" / "mola", others.parts.moe, ranks)
    with pytest.raises(UserError, match="its experts are not mixed by users"):
        bake_user(theirs, workshop / "out", "u1", torch.ones(5))
    (workshop / "lora").mkdir()
    (workshop / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="its experts are not mixed by users"):
        bake_user(workshop / "lora", workshop / "out", "u1", torch.ones(5))
    with pytest.raises(UserError, match="nothing in it depends on the user"):
        answer(theirs, "w1", system=None, model=None, max_new_tokens=2, user="u1", features=workshop / "users.npz")


def test_data_without_users_are_refused_before_a_process_starts(workshop: Path) -> None:
    with pytest.raises(UserError, match=r'up\.train\.jsonl:1: there is no key "user"'):
        check_data(loaded(workshop, "nobody", f"data.train=[{workshop}/up.train.jsonl]"))


@pytest.mark.slow
def test_resumed_on_other_numbers_of_ranks(workshop: Path) -> None:
    """Which samples have which dropout in their gates does not depend on where they are."""
    own = (
        f"data.train=[{workshop}/users.train.jsonl]",
        f"data.features={workshop}/users.npz",
        *("moe.unit=linear", "moe.top_k=null", "moe.router.input=user", "moe.router_aux_loss_coef=0", "lora.dropout=0.1"),
    )
    whole = run_ranks(2, train_until, str(workshop), "never-stopped", 6, own, timeout=240)[0]
    first = run_ranks(2, train_until, str(workshop), "stopped", 3, own, timeout=240)[0]
    again = run_ranks(3, train_until, str(workshop), "stopped", 6, (*own, "resume=true"), timeout=240)[0]
    assert np.allclose(whole, [*first, *again], rtol=1e-9, atol=0), (whole, first, again)
