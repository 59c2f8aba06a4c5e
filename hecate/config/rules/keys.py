"""Check the rules that concern several keys of a configuration, and that the files it names exist.

`typed.py` checks types before this; `schema.py` gives each number's range.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hecate.config.expert_keys import DEFAULT_EXPERTS, DEFAULT_TOP_K
from hecate.config.files.hub import hub_hint
from hecate.config.files.paths import ADAPTER_CONFIG, INDEXED_SUFFIXES, adapter_in, data_files, file_form, find_model, indexed_prefix
from hecate.config.files.presets import chat_templates, preset_names
from hecate.config.problems import Add, did_you_mean, or_default, shorten
from hecate.config.ranges import COUNT, POSITIVE, WHOLE
from hecate.config.rules.best_model import check_best_model
from hecate.config.rules.deterministic import check_deterministic
from hecate.config.rules.megatron import check_megatron, check_megatron_ep
from hecate.config.rules.of_apps import section_rules
from hecate.config.rules.optimizers import check_optimizer
from hecate.config.rules.pairs import check_pairs, largest_rank
from hecate.config.rules.replay import check_replay
from hecate.config.rules.routers import check_router
from hecate.config.schema import LEAVES, MEGATRON_EP, RANGES, ROLES, DataSource
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import kind_of

_KEEP_A_BOUND = ("auto", "llep")
"""the policies that read fssdp.max_imbalance"""
SLUG = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_values(values: Mapping[str, Any], add: Add, *, claim_output: bool, inputs: bool = True, trains: bool = True) -> None:
    """Add every problem of `values`, which maps dotted keys to typed values.

    A key that is absent already has a problem, so rules that depend on it are skipped.

    Args:
        inputs: whether the model's weights and the data must be there.
        trains: whether the training data and the adapter of lora.init_from must be there.
    """
    for key, allowed in RANGES.items():
        value = values.get(key)
        for at, one in _numbers(key, value):
            # The default of max_steps is outside its range: it says that num_train_epochs is given.
            if one is not None and one not in allowed and value != LEAVES[key].default:
                add(at, f"must be {allowed}, got {one}", "")
    for rules in section_rules():
        values = rules.checked(values, add)
    _check_length(values, add)
    _check_warmup(values, add)
    _check_experts(values, add)
    _check_kind(values, add, trains=trains)
    check_pairs(values, add)
    check_router(values, add)
    check_replay(values, add)
    check_deterministic(values, add)
    check_optimizer(values, add)
    check_best_model(values, add)
    _check_separate(values, add)
    _check_evaluation(values, add)
    _check_fssdp(values, add)
    _check_retained(values, add)
    _check_sources("data.train", values, add, exist=inputs and (trains or bool(values.get("data.eval_share"))))
    _check_sources("data.eval", values, add, exist=inputs)
    _check_roles("data.roles_to_train", values.get("data.roles_to_train", ()), add)
    _check_template(values, add, exists=inputs)
    _check_target_modules(values, add)
    _check_names(values, add)
    if values.get("data.packing") and 2 <= values.get("data.seq_len", 8) < 8:
        add(
            "data.seq_len",
            f"must be >= 8 with data.packing, got {values['data.seq_len']}",
            "or set data.packing to false",
        )
    if values.get("model.front_end") == "megatron":
        check_megatron(values, add)
    else:
        _check_model(values, add, weights=inputs)
    check_megatron_ep(values, add)
    _check_attention(values, add)
    _check_kernels(values, add)
    _check_topology(values, add)
    _check_workers(values, add)
    _check_output_dir(values, add, claim=claim_output)


def _numbers(at: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A key's value, or each item of a list, and of lists in it, by its place."""
    if isinstance(value, tuple | list):
        for number, one in enumerate(value):
            yield from _numbers(f"{at}[{number}]", one)
    else:
        yield at, value


def _check_length(values: Mapping[str, Any], add: Add) -> None:
    if "max_steps" not in values or "num_train_epochs" not in values:
        return
    if values["max_steps"] and values["num_train_epochs"] is not None:
        add("num_train_epochs", "cannot be given together with max_steps: both say how long to train", "keep one of the two")
    elif not values["max_steps"] and values["num_train_epochs"] is None:
        hint = "add one of them to the file, or max_steps=... to the command line"
        add("max_steps", "must be given, at least 1, or num_train_epochs in its place", hint)


def _check_warmup(values: Mapping[str, Any], add: Add) -> None:
    if values.get("warmup_steps") is not None and values.get("warmup_ratio"):
        add("warmup_steps", "cannot be given together with warmup_ratio: both say how long the warm-up is", "keep one of the two")


def _check_model(values: Mapping[str, Any], add: Add, *, weights: bool) -> None:
    if values.get("model.tokenizer") is not None:
        add("model.tokenizer", "is read with model.front_end=megatron only", "leave it out: a checkpoint has its own tokenizer")
    if values.get("model.tensor_parallel", 1) > 1:
        add("model.tensor_parallel", "needs model.front_end=megatron, whose layers can be split", "leave it at 1")
    if "model.name_or_path" in values:
        try:
            find_model(values["model.name_or_path"], weights=weights)
        except UserError as error:
            what, _, hint = str(error).partition("\n")
            add("model.name_or_path", what, hint)


def _check_experts(values: Mapping[str, Any], add: Add) -> None:
    kind = kind_of(values.get("moe.family", ""), values.get("moe.unit", "ffn"))
    own = (kind is not None and kind.of_moe_base) or values.get("model.front_end") == "megatron"
    key, allocation = "moe.num_experts", values.get("moe.allocation")
    experts = or_default(values, key, None if own else DEFAULT_EXPERTS)
    if allocation is not None:
        _check_allocation(values, allocation, add, own=own)
        key, experts = "moe.allocation", allocation
    if experts is None:
        return
    if isinstance(experts, int):
        counts = (experts,)
        if experts not in COUNT and (experts, values.get("adapter")) != (0, "lora"):
            add("moe.num_experts", f"must be {COUNT}, got {experts}", "")
    else:
        counts = experts
        for i, count in enumerate(experts):
            if count not in WHOLE:
                add(
                    f"{key}[{i}]",
                    f"must be {WHOLE}, got {count}",
                    "0 gives the layer no experts",
                )
        if not any(experts):
            add(key, "must give experts to at least one layer", "")
        layers = values.get("model.num_hidden_layers")
        if key == "moe.num_experts" and layers is not None and layers != len(experts):
            what = f"lists {len(experts)} layers, but model.num_hidden_layers is {layers}"
            add("moe.num_experts", what, f"give one number for all layers, or {layers} of them")
    takes_all = values.get("moe.router.dense") or values.get("moe.router.input") == "user"
    top_k = None if takes_all else or_default(values, "moe.top_k", None if own else DEFAULT_TOP_K)
    fewest = min((count for count in counts if count > 0), default=0)
    given = values.get("moe.router.input") == "given"  # where top_k is 1
    if top_k is not None and 0 < fewest < top_k and not given:
        add("moe.top_k", f"must be from 1 to {fewest}, the fewest experts of a layer ({key}), got {top_k}", "")


def _check_allocation(values: Mapping[str, Any], allocation: tuple[int, ...], add: Add, *, own: bool) -> None:
    key, layers = "moe.allocation", values.get("model.num_hidden_layers")
    if values.get("moe.num_experts") is not None:
        add(key, "cannot be given together with moe.num_experts: both say how many experts each layer has", "keep one of the two")
    if own:
        add(key, "cannot be given here: the model has its own number of experts in each layer", "leave it out")
    if layers is not None and len(allocation) > layers:
        what = f"has {len(allocation)} groups of layers, but model.num_hidden_layers is {layers}"
        add(key, what, f"give at most {layers} numbers, or moe.num_experts")


def _check_kind(values: Mapping[str, Any], add: Add, *, trains: bool) -> None:
    family, over_linears = values.get("moe.family"), values.get("moe.unit") == "linear"
    if over_linears and values.get("model.front_end") == "megatron":
        what = "linear needs model.front_end=transformers: Megatron's front end builds a model from scratch, which has no frozen linears"
        add("moe.unit", what, "leave moe.unit out")
        return
    kind = kind_of(values.get("moe.family", ""), values.get("moe.unit", "ffn"))
    if kind is None:
        if over_linears and family is not None:
            what = f"linear does not go together with moe.family={family}: the experts of a linear are LoRA pairs beside it"
            add("moe.unit", what, "leave moe.family out, or moe.unit")
        return
    folder = values.get("lora.init_from")
    if folder is not None and not kind.has_pairs:
        add("lora.init_from", f"is about low-rank pairs, which experts of moe.family={family} do not have", "leave it out")
    elif folder is not None and trains and not _has_adapter(folder, values):
        hint = "give the folder of an adapter, or of a run that has left one; of a checkpoint, hecate export CHECKPOINT -o FOLDER makes one"
        add("lora.init_from", f"no {ADAPTER_CONFIG} in {shorten(folder)}", hint)
    for key, leaf in LEAVES.items():
        if leaf.family not in (None, family) and key in values and values[key] != leaf.default:
            add(key, f"applies to moe.family={leaf.family} only, but the family is {family}", "leave it out")
    # Rank, alpha and dropout stay allowed: a configuration that gives them is trained with another family by an override.
    for key in ("lora.pairs", "lora.gradient_rule", "lora.use_rslora"):
        if not kind.has_pairs and key in values and values[key] != LEAVES[key].default:
            add(key, f"is about low-rank pairs, which experts of moe.family={family} do not have, got {values[key]}", "leave it out")


def _has_adapter(folder: str, values: Mapping[str, Any]) -> bool:
    """Whether a folder holds an adapter, or, where experts are adapters of sources, one for each of them."""
    by_source = values.get("moe.router.input") == "given" and "data.train" in values
    own = [os.path.join(folder, source.name, ADAPTER_CONFIG) for source in values["data.train"]] if by_source else []
    return os.path.isfile(adapter_in(folder) / ADAPTER_CONFIG) or (bool(own) and all(map(os.path.isfile, own)))


def _check_separate(values: Mapping[str, Any], add: Add) -> None:
    sources = len(values.get("data.train", ()))
    if not values.get("data.separate") or not sources:
        return
    sequences = values.get("micro_batch_size", sources) * values.get("gradient_accumulation_steps", sources)
    if sequences % sources:
        what = f"takes equally many sequences of each of {sources} items, but a step has {sequences} for each rank"
        add("data.separate", what, f"let micro_batch_size times gradient_accumulation_steps be a multiple of {sources}")


def _check_evaluation(values: Mapping[str, Any], add: Add) -> None:
    if values.get("data.eval", True) or values.get("data.eval_share", True):
        return
    if values.get("eval.generate"):
        add("eval.generate", "needs data.eval, which is empty", "name evaluation data, give data.eval_share, or set it to false")
    if values.get("eval_steps") is not None:
        add("eval_steps", "needs data.eval, which is empty", "name evaluation data, give data.eval_share, or set it to null")


def _check_fssdp(values: Mapping[str, Any], add: Add) -> None:
    policy, slots, redundancy = (values.get(f"fssdp.{name}") for name in ("policy", "memory_slots", "redundancy"))
    if values.get("fssdp.plan") == "calibrated" and values.get("fssdp.prefetch") == 0:
        add("fssdp.prefetch", "must be >= 1 with fssdp.plan=calibrated, got 0", "use exact if nothing is to be gathered before the router")
    if values.get("fssdp.verify_copies_steps") and redundancy == 0:
        add("fssdp.verify_copies_steps", "compares experts with their backups, but there are none", "set fssdp.redundancy=1, or 2")
    if values.get("fssdp.max_imbalance") is not None and policy not in (None, *_KEEP_A_BOUND, MEGATRON_EP):
        what = f"is read by the policies {' and '.join(_KEEP_A_BOUND)} only, but fssdp.policy is {policy}"
        add("fssdp.max_imbalance", what, "leave it out")
    if slots is not None and policy == "full" and not values.get("deterministic"):
        what = f"limits the replicas on a rank, but fssdp.policy=full has all experts on every rank, got {slots}"
        add("fssdp.memory_slots", what, "set it to null, or take another policy")
    size, ranks = values.get("fssdp.shard_size"), values.get("nproc")
    if size is None or ranks is None or size < 1:
        return
    if ranks % size:
        add("fssdp.shard_size", f"must divide the number of ranks, which is {ranks} (nproc), got {size}", "null: all ranks")
    if 1 < ranks // size <= (redundancy or 0):
        what = f"{redundancy} needs more sharding groups than that, which hold each other's experts, got {ranks // size}"
        add("fssdp.redundancy", what, "set it to 1, or fssdp.shard_size to less, or to null")


def _check_retained(values: Mapping[str, Any], add: Add) -> None:
    for key in ("save_retain_steps", "save_retain_hours"):
        if values.get(key) is not None and values.get("save_total_limit", 1) is None:
            add(key, "needs save_total_limit, without which all checkpoints are kept", "set save_total_limit, or leave it out")


def _check_sources(key: str, values: Mapping[str, Any], add: Add, *, exist: bool) -> None:
    sources = values.get(key, ())
    if key in values and key == "data.train" and not sources:
        add(key, "must name at least one source", "")
    first_of: dict[str, int] = {}
    for i, source in enumerate(sources):
        at = f"{key}[{i}]"
        prefix = indexed_prefix(source.path)
        paths: list[str] = []
        try:
            if exist:
                paths = data_files(source.path) if prefix is None else [prefix + suffix for suffix in INDEXED_SUFFIXES]
        except UserError as error:
            what, _, hint = str(error).partition("\n")
            add(f"{at}.path", what, hint)
        for path in paths:
            if not os.path.exists(path):
                hint = "relative paths start from the working directory; nothing is downloaded"
                hint = "~ is not expanded" if path.startswith("~") else f"{hint}.{hub_hint(source.path)}".removesuffix(".")
                add(f"{at}.path", f"no such file or folder: {shorten(path)}", hint)
        if prefix is not None and source.format != "auto":
            add(f"{at}.format", f"applies to text files only, got {source.format}", "leave it out: an indexed data set holds token ids")
        if prefix is not None and source.fields is not None:
            add(f"{at}.fields", "applies to files of records only", "leave it out: an indexed data set holds token ids")
        _check_reading(at, source, paths, add)
        if source.weight not in POSITIVE:
            add(f"{at}.weight", f"must be {POSITIVE}, got {source.weight}", "leave the source out to give it no weight")
        if not SLUG.fullmatch(source.name):
            what = f"must be 1 to 64 of A-Z a-z 0-9 . _ -, got {shorten(source.name)}"
            add(f"{at}.name", what, "give the source a name: {path: ..., name: ...}")
        elif source.name in first_of:
            what = f"{source.name} is already the name of {key}[{first_of[source.name]}]"
            add(f"{at}.name", what, "give each source its own name: {path: ..., name: ...}")
        first_of.setdefault(source.name, i)


def _check_reading(at: str, source: DataSource, paths: list[str], add: Add) -> None:
    """Check how the text of a source's files is read."""
    forms = {file_form(path) for path in paths}
    if source.sample_by is not None and paths and forms != {"text"}:
        add(f"{at}.sample_by", "applies to plain text only, to files that end in .txt or .md", "leave it out: a record is a sample")
    if source.delimiter is not None:
        if len(source.delimiter) != 1 or source.delimiter in '"\r\n':
            add(f"{at}.delimiter", f"must be one sign, no quote, got {shorten(source.delimiter)}", 'a tab is written "\\t"')
        elif paths and not forms <= {"csv", "tsv"}:
            add(f"{at}.delimiter", "applies to CSV files only, which end in .csv or .tsv", "leave it out")
    _check_roles(f"{at}.roles_to_train", source.roles_to_train or (), add)


def _check_roles(key: str, roles: Sequence[str], add: Add) -> None:
    for i, role in enumerate(roles):
        if role not in ROLES:
            add(f"{key}[{i}]", f"must be one of {', '.join(ROLES)}, got {shorten(role)}", "human is user, and gpt is assistant")


def _check_target_modules(values: Mapping[str, Any], add: Add) -> None:
    key = "lora.target_modules"
    modules = values.get(key)
    if modules is None:
        return
    if not modules:
        add(key, "must name at least one module", "the usual ones are q_proj, v_proj, gate_proj, up_proj, down_proj")
    for i, module in enumerate(modules):
        if module in modules[:i]:
            add(f"{key}[{i}]", f"{shorten(module)} is listed twice", "keep one of the two")
        elif not re.fullmatch(r"[A-Za-z0-9_]+", module):
            what = f"must be a module's name of letters, digits and _, got {shorten(module)}"
            add(f"{key}[{i}]", what, "give the last part of its dotted name; it is adapted in every layer, and patterns are not supported")
    well_named = len(set(modules)) == len(modules) and all(re.fullmatch(r"[A-Za-z0-9_]+", module) for module in modules)
    over_linears = values.get("moe.unit") == "linear"
    if modules and well_named and not over_linears and not set(modules) & {"gate_proj", "up_proj", "down_proj"}:
        add(key, "names none of gate_proj, up_proj, down_proj: no expert would have anything to train", "add at least one of them")


def _check_names(values: Mapping[str, Any], add: Add) -> None:
    """Check lists whose items are names that hecate knows."""
    known = {"weight_decay_exclude": ("norms", "biases", "routers"), "report_to": ("tensorboard", "wandb", "mlflow", "trackio")}
    for key, kinds in known.items():
        for i, kind in enumerate(values.get(key, ())):
            if kind not in kinds:
                hint = "name each that is wanted" if kind == "all" else did_you_mean(kind, kinds)
                add(f"{key}[{i}]", f"must be one of {', '.join(kinds)}, got {shorten(kind)}", hint)
    reported = values.get("report_to", ())
    if len(set(reported)) < len(reported):
        add("report_to", "names a tracker twice", "name each once")


def _check_attention(values: Mapping[str, Any], add: Add) -> None:
    key, way, dtype = "model.attention", values.get("model.attention"), values.get("model.dtype")
    if way in (None, "auto"):
        return
    if values.get("model.front_end") == "megatron":
        add(key, "applies to model.front_end=transformers only: Megatron's layers have an attention of their own", "leave it out")
    elif way == "flash" and dtype in ("float32", "float64"):
        add(key, f"flash computes in bfloat16, but model.dtype is {dtype}", "use auto, or model.dtype=bfloat16")
    elif way == "flex" and dtype == "float64":
        add(key, "flex computes in bfloat16 or float32, but model.dtype is float64", "use auto or sdpa")


def _check_kernels(values: Mapping[str, Any], add: Add) -> None:
    if values.get("kernels") != "triton":
        return
    if values.get("model.dtype") == "float64":
        add("kernels", "triton computes in float32 or bfloat16, but model.dtype is float64", "use auto or torch")
    if largest_rank(values) > 256:
        add("kernels", f"triton takes LoRA ranks up to 256, but lora.r is {largest_rank(values)}", "use auto or torch")


def _check_workers(values: Mapping[str, Any], add: Add) -> None:
    workers, fewest = values.get("ray.workers"), values.get("ray.min_workers")
    if workers is not None and fewest is not None and fewest > workers:
        add("ray.min_workers", f"must be from 1 to {workers} (ray.workers), got {fewest}", "")
    for i, label in enumerate(values.get("ray.labels", ())):
        if not re.fullmatch(r"[A-Za-z0-9._/-]+=([A-Za-z0-9._-]+|in\([A-Za-z0-9._, -]+\))", label):
            add(f"ray.labels[{i}]", f"must be KEY=VALUE or KEY=in(A,B), got {shorten(label)}", "")


def _check_template(values: Mapping[str, Any], add: Add, *, exists: bool) -> None:
    given, known = values.get("data.chat_template"), chat_templates()
    if exists and given is not None and given not in known and not os.path.isfile(given):
        what = f"no such file, and no chat template of hecate's has this name: {shorten(given)}"
        add("data.chat_template", what, f"give a Jinja file, or one of {', '.join(known)}; null: the tokenizer's own")


def _check_topology(values: Mapping[str, Any], add: Add) -> None:
    topology = values.get("topology")
    if topology is None:
        return
    if "/" in topology or topology.endswith((".yaml", ".yml")):
        if not os.path.isfile(topology):
            add("topology", f"no such file: {shorten(topology)}", "give auto, a preset's name or an existing YAML file")
    elif not SLUG.fullmatch(topology):
        add("topology", f"must be auto, a preset's name or a YAML file, got {shorten(topology)}", "")
    elif topology != "auto" and topology not in (known := preset_names("topologies")):
        add("topology", f"no such preset: {shorten(topology)}", f"use auto, {', '.join(known)}, or the path of a YAML file")


def _check_output_dir(values: Mapping[str, Any], add: Add, *, claim: bool) -> None:
    if "output_dir" not in values:
        return
    path = Path(values["output_dir"])
    if not SLUG.fullmatch(path.name) or path.name == "..":
        what = f"its last component must be 1 to 64 of A-Z a-z 0-9 . _ -, got {shorten(path.name) or 'none'}"
        add("output_dir", what, "for example runs/first")
        return
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        add("output_dir", f"{shorten(str(nearest))} is not a folder", "choose another")
    elif claim and nearest != path:
        try:  # permissions alone do not say it: /proc, a disk that is full or read-only
            os.rmdir(tempfile.mkdtemp(prefix=".hecate-", dir=nearest))
        except OSError as error:
            add("output_dir", f"no folder can be made in {shorten(str(nearest))}: {error.strerror}", "choose another")
    elif claim and nearest == path and values.get("resume") is False:
        try:
            empty = not any(path.iterdir())
        except OSError as error:
            add("output_dir", f"cannot be read: {error.strerror}", "choose another")
        else:
            if not empty:
                add("output_dir", f"{shorten(str(path))} exists and is not empty", "choose another, or pass resume=true")
