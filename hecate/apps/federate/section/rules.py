"""What the clients of federated rounds are as keys of an ordinary run, and which choices of rounds go together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hecate.apps.federate.section.settings import ClientConfig, rounds_of
from hecate.config.files.paths import find_model, name_of_source
from hecate.config.problems import Add, shorten
from hecate.config.rules.of_apps import SectionRules
from hecate.config.schema import LEAVES, Config
from hecate.config.typed import INVALID, Report
from hecate.errors import UserError
from hecate.io.plain_files import read_plain

_PREFIX = "rounds."
_CLIENTS = "rounds.clients"
_OWN_NAMES = ("sweep", "union")
"""names that files beside the clients' have"""
_EXPERTS: dict[str, Any] = {"moe.unit": "linear", "moe.router.input": "given", "moe.top_k": 1, "moe.router_aux_loss_coef": 0.0}
"""of the run that trains all clients at once: each is an expert, to which the sample's source leads"""
_REPLACED = {
    "data.train": "give each client its data",
    "data.eval": "give each client its eval",
    "data.eval_share": "give each client its eval",
    "metric_for_best_model": "all rounds are evaluated, and their figures are kept",
    "load_best_model_at_end": "the result of each round is kept",
    "early_stopping_patience": "there are rounds.count rounds",
    "max_steps": "give rounds.local_steps",
    "num_train_epochs": "give rounds.local_steps",
    "moe.num_experts": "there are as many as clients",
    "moe.allocation": "there are as many experts as clients",
    "data.separate": "each client's samples are its own",
    "data.skip_steps": "each round goes on in the data where the last has ended",
    "lora.init_from": "the first round begins with a new adapter, and each later one with the result of the last",
}
"""keys that the clients decide, and what to do in their place"""


class RoundsRules(SectionRules):
    """What becomes of the section `rounds`."""

    def localised(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with the paths of `data.train` and `data.eval`, which `derived` has made of the clients', in the clients."""
        clients = values.get(_CLIENTS)
        if clients is INVALID or not clients:
            return values
        train = [source["path"] for source in values["data.train"]]
        held_out = {source["name"]: source["path"] for source in values["data.eval"]}
        local = [
            {**client, "data": path} | ({"eval": held_out[client["name"]]} if client.get("eval") is not None else {})
            for client, path in zip(clients, train, strict=True)
        ]
        return values | {_CLIENTS: tuple(local)}

    def derived(self, values: dict[str, Any], report: Report) -> dict[str, Any]:
        """Return the typed values of a configuration with those that its clients decide: the data, the experts and their ranks, the length.

        Values without clients stay as they are.
        """
        clients = values.get(_CLIENTS)
        if clients is INVALID or not clients:
            return values
        for key, hint in _REPLACED.items():
            if key in values:
                report.add(key, f"cannot be given with {_CLIENTS}", f"leave it out: {hint}")
        for key, value in _EXPERTS.items():
            if key in values and values[key] not in (value, INVALID):
                report.add(
                    key, f"must be {value} with {_CLIENTS}, whose adapters stand over single linears, got {values[key]}", "leave it out"
                )
        named = [{**client, "name": client.get("name") or name_of_source(client["data"])} for client in clients]
        held_out = [(number, client) for number, client in enumerate(named) if client.get("eval") is not None]
        for number in range(len(named)):
            report.renamed[f"data.train[{number}].path"] = f"{_CLIENTS}[{number}].data"
            report.renamed[f"data.train[{number}].name"] = f"{_CLIENTS}[{number}].name"
        for at, (number, _) in enumerate(held_out):
            report.renamed[f"data.eval[{at}].path"] = f"{_CLIENTS}[{number}].eval"
        own: dict[str, Any] = {
            **_EXPERTS,
            _CLIENTS: tuple(named),
            "data.train": tuple({"path": client["data"], "name": client["name"]} for client in named),
            "data.eval": tuple({"path": client["eval"], "name": client["name"]} for _, client in held_out),
            "data.separate": True,
            "moe.num_experts": len(named),
            "moe.allocation": None,
        }
        steps, rank = values.get("rounds.local_steps"), values.get("lora.r", LEAVES["lora.r"].default)
        if isinstance(steps, int):
            own["max_steps"] = steps
        elif steps is not INVALID:
            report.add("rounds.local_steps", f"must be given with {_CLIENTS}", "the optimizer steps of each client in a round")
        ranks = [rank if client.get("r") is None else client["r"] for client in named]
        if all(isinstance(one, int) for one in ranks) and any(client.get("r") is not None for client in named):
            own["lora.r"] = ranks[0] if len(set(ranks)) == 1 else tuple(ranks)
        elif isinstance(rank, tuple):
            report.add("lora.r", f"must be one number with {_CLIENTS}", "give a client whose rank is another r")
        kept = {key: value for key, value in values.items() if key not in _REPLACED}
        return kept | own | ({} if "max_steps" in own else {"max_steps": 1})

    def require_one_training(self, config: Config) -> None:
        """Raises UserError: the configuration is one of federated rounds, which are more than one training."""
        if rounds_of(config).clients:
            raise UserError("rounds.clients: are trained by hecate federate, in rounds\n  give it this configuration, or leave rounds out")

    def checked(self, values: Mapping[str, Any], add: Add) -> Mapping[str, Any]:
        """Add every problem of the keys of `rounds`, given the typed values of all dotted keys. Absent keys have a problem already.

        Return the values that other rules are to look at: without what was judged here, and without `data.separate`, since
        `hecate federate` gives the run of all clients as many micro-steps as that takes.
        """
        clients: tuple[ClientConfig, ...] | None = values.get(_CLIENTS)
        if clients is None:
            return values
        changed = [key for key, leaf in LEAVES.items() if key.startswith(_PREFIX) and key in values and values[key] != leaf.default]
        if not clients:
            for key in changed:
                add(key, f"is read with {_CLIENTS} only", "name the clients, or leave it out")
            return values
        _check_clients(clients, add)
        _check_aggregate(values, clients, changed, add)
        _check_base(values, add)
        _check_pairs(values, add)
        _check_drop(values, clients, add)
        _check_privacy(values, add)
        if values.get("deterministic"):
            what = (
                "does not go together with deterministic: it is of runs that follow each other, which nothing has held to the same bits yet"
            )
            add(_CLIENTS, what, "leave deterministic out")
        replays = [
            key for key, replayed in (("fssdp.plan", ("replay",)), ("moe.replay", ("force", "check"))) if values.get(key) in replayed
        ]
        for key in replays[:1]:
            add(key, "does not go together with rounds.clients, whose adapters the sample's source decides", "leave it out")
        return {key: value for key, value in values.items() if key not in (*replays, "data.separate")}


RULES = RoundsRules()


def _check_clients(clients: tuple[ClientConfig, ...], add: Add) -> None:
    for number, client in enumerate(clients):
        at = f"{_CLIENTS}[{number}]"
        if client.name.lower() in _OWN_NAMES or client.name.startswith("."):
            add(f"{at}.name", f"{shorten(client.name)} is the name of a file beside those of the clients", "give another name")
        if client.r is not None and client.r < 1:
            add(f"{at}.r", f"must be an integer >= 1, got {client.r}", "")
        if client.weight is not None and not (client.weight > 0 and math.isfinite(client.weight)):
            add(f"{at}.weight", f"must be a number > 0, got {client.weight}", "leave the client out to give it no part")
    weights = [client.weight for client in clients if client.weight is not None]
    if weights and len(weights) < len(clients):
        without = next(client.name for client in clients if client.weight is None)
        add(_CLIENTS, f"{without} has no weight, but others have one", "give all clients one, or none: their records are counted then")
    elif weights and abs(math.fsum(weights) - 1) > 1e-6:
        hint = "divide each by the sum; or leave all out: their records are counted then"
        add(_CLIENTS, f"the weights have the sum {math.fsum(weights):g}, which must be 1", hint)


def _check_aggregate(values: Mapping[str, Any], clients: tuple[ClientConfig, ...], changed: list[str], add: Add) -> None:
    aggregate, merges, count = (values.get(_PREFIX + name) for name in ("aggregate", "merge_into_base", "count"))
    ranks = values.get("lora.r")
    if aggregate is None or merges is None or count is None:
        return
    if aggregate != "refine":
        for key in changed:
            if key.startswith(_PREFIX + "refine."):
                add(key, f"is read with rounds.aggregate=refine only, but it is {aggregate}", "leave it out")
    elif isinstance(ranks, tuple):
        add(_PREFIX + "aggregate", f"refine needs clients of one rank, but they have {', '.join(map(str, ranks))}", "use stack")
    if aggregate == "stack":
        for key in changed:
            if key.startswith(_PREFIX + "codec."):
                what = "does not go together with rounds.aggregate=stack, where each client's terms stand for themselves"
                add(key, what, "leave it out, or use average")
    if aggregate != "average" or isinstance(ranks, tuple):
        why = "is read with rounds.aggregate=average only" if aggregate != "average" else "needs clients of one rank"
        for key in changed:
            if key.startswith(_PREFIX + "server."):
                add(key, why, "leave it out")
    if merges and aggregate != "stack":
        what = f"is for rounds.aggregate=stack, but it is {aggregate}, whose result clients go on with"
        add(_PREFIX + "merge_into_base", what, "leave it out")
    if aggregate == "stack" and not merges and count > 1:
        what = "stack has more terms than any client's adapter, so that no client can go on with it"
        add(_PREFIX + "aggregate", what, "set rounds.merge_into_base=true: the next round then begins with new adapters")


def _check_base(values: Mapping[str, Any], add: Add) -> None:
    name = values.get("model.name_or_path")
    if not values.get(_PREFIX + "merge_into_base"):
        return
    if values.get("model.num_hidden_layers") is not None:
        what = "merges into the whole base model, but with model.num_hidden_layers its last layers have no adapters"
        add(_PREFIX + "merge_into_base", what, "leave model.num_hidden_layers out, or give a base model that has only the layers to keep")
    if name is None:
        return
    try:
        path = find_model(name)
    except UserError:
        return  # is a problem of model.name_or_path
    if path.suffix == ".gguf" or _is_quantised(path):
        what = f"needs a base model whose weights are not quantised, but {shorten(name)} has quantised ones"
        hint = "dequantise it first: load it with transformers, and save it by save_pretrained; give that folder as model.name_or_path"
        add(_PREFIX + "merge_into_base", what, hint)


def _is_quantised(folder: Path) -> bool:
    try:
        described = json.loads(read_plain(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(described, dict) and described.get("quantization_config") is not None


def _check_pairs(values: Mapping[str, Any], add: Add) -> None:
    pairs, aggregate = values.get("lora.pairs"), values.get(_PREFIX + "aggregate")
    if pairs in ("nola", "shards"):
        add("lora.pairs", f"{pairs} makes A and B of other numbers, which no aggregate of adapters gives back", "use plain or fixed_a")
    if pairs == "fixed_a" and aggregate in ("stack", "lego"):
        add(_PREFIX + "aggregate", f"{aggregate} changes A, which is fixed with lora.pairs=fixed_a", "use average, which is exact then")
    if (rule := values.get("lora.gradient_rule", "none")) != "none":
        add("lora.gradient_rule", f"{rule} is not supported in rounds", "leave it out")


def _check_privacy(values: Mapping[str, Any], add: Add) -> None:
    if values.get(_PREFIX + "codec.error_feedback") and values.get(_PREFIX + "codec.up") == 1:
        add(_PREFIX + "codec.error_feedback", "keeps what is not sent, but with rounds.codec.up=1 all is sent", "leave it out, or lower up")
    if values.get("privacy.clip") is None:
        return
    if values.get(_PREFIX + "codec.error_feedback"):
        what = "cannot be with privacy.clip: what a client keeps is the change of all earlier rounds, so a sample would count in each again"
        add(_PREFIX + "codec.error_feedback", what, "leave it out")
    skips = values.get("data.on_bad_sample", "error")
    if values.get("privacy.noise") and skips not in ("error", "truncate"):
        what = f"must be error or truncate with privacy.noise, whose epsilon depends on the number of each client's samples; got {skips}"
        add("data.on_bad_sample", what, "set data.on_bad_sample=truncate")


def _check_drop(values: Mapping[str, Any], clients: tuple[ClientConfig, ...], add: Add) -> None:
    names, gone = [client.name for client in clients], dict[int, set[str]]()
    for number, item in enumerate(values.get(_PREFIX + "drop", ())):
        at, (of_round, _, name) = f"{_PREFIX}drop[{number}]", item.partition(":")
        if not re.fullmatch(r"[1-9]\d*", of_round) or name not in names:
            add(at, f"must be ROUND:CLIENT, got {shorten(item)}", f"the clients are {shorten(', '.join(names))}")
        elif int(of_round) > values.get(_PREFIX + "count", int(of_round)):
            add(at, f"there are {values['rounds.count']} rounds, got {of_round}", "")
        else:
            gone.setdefault(int(of_round), set()).add(name)
    for of_round, dropped in gone.items():
        if len(dropped) == len(names):
            add(_PREFIX + "drop", f"leaves no client in round {of_round}", "leave one out")
