"""What goes together with differential privacy."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.apps.federate.privacy.rules import RULES
from hecate.apps.federate.privacy.settings import privacy_keys
from hecate.config import ConfigError
from tests.hecate.config.making import MINIMAL, load

PRIVATE = (
    "data.train=[a.jsonl,b.jsonl]",
    "data.packing=false",
    "lora.target_modules=[gate_proj,up_proj,down_proj]",
    "moe={num_experts: 2, top_k: 1, router_aux_loss_coef: 0, router: {input: given}}",
    "max_grad_norm=null",
    "fssdp.policy=full",
    "privacy={clip: 1.0, noise: 0.5}",
)
REFUSED = [
    (
        ["data.packing=true"],
        "data.packing: must be false with privacy.clip, .*a packed sequence has several; got true.*set data.packing=false",
    ),
    (["max_grad_norm=1.0"], "max_grad_norm: must be null with privacy.clip, which clips already"),
    (["fssdp.policy=auto"], "fssdp.policy: must be full with privacy.clip, .*no token of it may go to another rank; got auto"),
    (["fssdp.plan=exact"], "fssdp.plan: must be history with privacy.clip"),
    (["fssdp.rematerialize=true"], "fssdp.rematerialize: must be false with privacy.clip"),
    (
        ["moe={num_experts: 2, top_k: 2, router: {input: token}}"],
        "moe.router.input: must be given with privacy.clip, .*nothing but their own samples",
    ),
    (["deterministic=true"], "privacy.clip: does not go together with deterministic: it clips the gradient of each sample"),
    (["lora.r=[4,8]"], "lora.r: must be one number with privacy.noise, which would fill what smaller ranks are padded with"),
    (["privacy={clip: 0}"], "privacy.clip: must be > 0"),
    (["privacy={clip: 1, delta: 1}"], "privacy.delta: must be > 0 and < 1"),
    (["privacy={clip: 1, noise: -1}"], "privacy.noise: must be >= 0"),
    (["privacy={noise: 0.5}"], "privacy.noise: is read with privacy.clip only, got 0.5"),
    (["privacy={clip: null, delta: 0.1}"], "privacy.delta: is read with privacy.clip only, got 0.1"),
]


def test_privacy_of_given_sources_is_allowed(folder: Path) -> None:
    config = load(MINIMAL, *PRIVATE)
    keys = privacy_keys(config)
    assert (keys.clip, keys.noise) == (1.0, 0.5)
    assert load(MINIMAL, *PRIVATE, "fssdp.plan=history").plan_choice == config.plan_choice == "history"


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(folder: Path, changes: list[str], message: str) -> None:
    replaced = {change.partition("=")[0] for change in changes}
    kept = [given for given in PRIVATE if given.partition("=")[0] not in replaced]
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        load(MINIMAL, *kept, *changes)
    assert len(error.value.problems) == 1


def test_an_infinite_clip_has_no_multiple() -> None:
    problems: list[str] = []
    RULES.checked({"privacy.clip": float("inf"), "privacy.noise": 1.0}, lambda key, what, hint: problems.append(f"{key}: {what}"))
    assert problems == ["privacy.clip: must be finite with privacy.noise, which is a multiple of it"]


ROUNDS = (
    "model: {name_or_path: model}\n"
    "output_dir: runs/rounds\n"
    "data: {packing: false, on_bad_sample: truncate}\n"
    "max_grad_norm: null\n"
    "fssdp: {policy: full}\n"
    "privacy: {clip: 1.0, noise: 0.5}\n"
    "rounds: {local_steps: 20, codec: {up: 0.5}, clients: [{data: a.jsonl}, {data: b.jsonl}]}\n"
)
NOT_IN_ROUNDS = [
    (
        "rounds.codec.error_feedback=true",
        "rounds.codec.error_feedback: cannot be with privacy.clip: .*a sample would count in each again.*leave it out",
    ),
    (
        "data.on_bad_sample=skip_long",
        "data.on_bad_sample: must be error or truncate with privacy.noise, .*number of each client's samples; got skip_long.*truncate",
    ),
    ("rounds.codec.up=0", "rounds.codec.up: must be > 0 and <= 1, got 0"),
    ("rounds.codec.down=1.5", "rounds.codec.down: must be > 0 and <= 1, got 1.5"),
]


@pytest.mark.parametrize(("change", "message"), NOT_IN_ROUNDS)
def test_what_does_not_go_together_in_rounds_is_refused(folder: Path, change: str, message: str) -> None:
    assert load(ROUNDS).rounds.codec.up == 0.5
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        load(ROUNDS, change)
    assert len(error.value.problems) == 1


def test_feedback_of_what_is_sent_whole_is_refused(folder: Path) -> None:
    plain = ROUNDS.replace("privacy: {clip: 1.0, noise: 0.5}\n", "").replace("codec: {up: 0.5}, ", "")
    with pytest.raises(ConfigError, match=r"(?s)codec\.error_feedback: keeps what is not sent, but with rounds\.codec\.up=1 all is"):
        load(plain, "rounds.codec.error_feedback=true")
