"""The keys of `lora` and `moe`: what an expert is, how many there are, and who decides which tokens they get.

How a key is written is said in `hecate.config.schema`, which has all other keys.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from hecate.config.ranges import AT_LEAST_ZERO, COUNT, POSITIVE, WHOLE, Range, key
from hecate.errors import UserError
from hecate.io.registry import registered_names
from hecate.parallel.values.expert_kinds import DEFAULT_BASES, ExpertKind, Family, LoraShape, ShardShape, kind_of, lora_scale

if TYPE_CHECKING:
    PairSourceName = str
    PairRuleName = str
    RouterInput = str
    RouterScore = str
else:  # each is a file of a folder, of which checkers do not know
    PairSourceName = Literal[registered_names("hecate.experts.pairs.sources", ("plain",))]
    PairRuleName = Literal["none", *registered_names("hecate.experts.pairs.rules")]
    RouterInput = Literal[registered_names("hecate.experts.routers.by_input", ("token",))]
    RouterScore = Literal[registered_names("hecate.experts.routers.scores", ("softmax",))]


@dataclass(frozen=True, kw_only=True)
class NolaConfig:
    """With lora.pairs nola: how A and B are made."""

    bases: int = field(default=DEFAULT_BASES, metadata=key(COUNT))
    """How many drawn matrices A is the sum of, and how many B. Each has a trained coefficient in every expert and projection."""


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """With lora.pairs shards: the pools, and how pairs are put together from them."""

    equivalent_rank: int = field(default=ShardShape.equivalent_rank, metadata=key(COUNT))
    """How much is trained: as much as plain pairs of this rank would have."""
    per_vector: int = field(default=ShardShape.per_vector, metadata=key(COUNT))
    """How many shards each row of A and each column of B consists of. Must divide the inputs and the outputs of all target modules."""
    private_rank: int = field(default=ShardShape.private_rank, metadata=key(WHOLE))
    """How many of the r rows of A, and of the columns of B, come from shards that no other pair takes. At most equivalent_rank and r."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r: int | tuple[int, ...] = field(default=16, metadata=key(COUNT))
    """The LoRA rank of every adapter, in experts and in attention; or, with pairs plain, a list with the rank of each expert, the same in
    all layers. Expert e is then scaled by alpha / r[e], and adapters outside experts have the largest rank."""
    alpha: float | None = field(default=None, metadata=key(POSITIVE))
    """The adapter's output is scaled by alpha / r. null: 32, or with gradient_rule row_norm, which allows no other, no scaling."""
    dropout: float = field(default=0.05, metadata=key(Range(0, 1, high_open=True)))
    """Probability of dropping an element of an adapter's input, in training only."""
    pairs: PairSourceName = "plain"
    """What of a pair is trained; see docs/results/systems.md. plain: A and B. fixed_a: B alone, with an A that is drawn from the seed, the
    same for all experts of a layer; the attention's adapters, too. nola: coefficients of matrices that are drawn from the seed, the same
    for all experts of the model, whose sums are A and B; the attention's adapters stay plain. shards: pools of shards that all layers
    share, from which each expert's A and B are put together by an index that is drawn from the seed (MoS); adapters outside experts stay
    plain."""
    nola: NolaConfig = field(default_factory=NolaConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    moe_rank_scaling: bool = field(default=False, metadata=key(family="moe_lora"))
    """Experts' pairs have the rank r / top_k, where top_k is the model's number of experts for each token, and all others the rank r.
    alpha stays, so that the experts' scale, alpha over their own rank, is larger. r must be a multiple of top_k."""
    experts: tuple[int | tuple[int, ...], ...] | None = field(default=None, metadata=key(WHOLE, family="moe_lora"))
    """The numbers of the experts, from 0, that train in every layer; or a list of such lists, one for each decoder layer, where [] stands
    for a layer without experts. The pairs of the others are zero and stay so: they have no gradients and no optimizer state, but their
    weights are stored, gathered and computed with as those of pairs that train. null: all experts train."""
    hottest_experts: int | None = field(default=None, metadata=key(COUNT, computes=False, family="moe_lora"))
    """In place of experts: in each layer so many experts train, those to which most tokens went by the loads in lora.loads; of equals
    those with lower numbers. The configuration in the run's folder has their numbers, and needs no loads. null: lora.experts says."""
    loads: str | None = field(default=None, metadata=key(computes=False, family="moe_lora"))
    """With hottest_experts, which needs it: the folder of a run's recorded loads (trace; docs/use/traces.md), such as runs/first/loads."""
    gradient_rule: PairRuleName = "none"
    """What happens to gradients on their way to A and B; see docs/results/systems.md. row_norm: that of each output row is multiplied by
    1 / sqrt(norm of the row of B A + 1 / eta^2), as in ALLoRA; it needs eta, dropout 0 and no alpha."""
    eta: float | None = field(default=None, metadata=key(POSITIVE))
    """With gradient_rule row_norm: the factor of rows where B is zero. ALLoRA's values are 1, sqrt(2) and 2."""
    init_from: str | None = field(default=None, metadata=key(computes=False))
    """A folder with an adapter from whose values training starts, or a run's folder that has one: with family mixlora one of hecate,
    mixlora or moe-peft; with moe_lora one of hecate, PEFT or a program that writes one pair for each expert; with unit linear one of
    hecate, or, with one expert for each linear, of PEFT. It must have the configuration's rank, scale, modules and experts. With
    router.input given it is a LoRA with which all experts begin, or a folder with one for each item of data.train, by its name. null: new
    adapters."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """The linear layers that get an adapter: those of the FFN one per expert, those of attention one each. With moe_lora, gate_proj and
    up_proj share one A if both are named; shared experts get none."""

    def __post_init__(self) -> None:
        if self.experts is not None:  # OmegaConf makes lists of the inner ones
            listed = tuple(tuple(one) if isinstance(one, list) else one for one in self.experts)
            object.__setattr__(self, "experts", listed)

    @property
    def shape(self) -> LoraShape:
        """What pair sources and adapters are made by."""
        scale = lora_scale(self.stored_alpha, self.rank, rslora=self.use_rslora)
        ranks = self.r if isinstance(self.r, tuple) else ()
        of_experts = tuple((rank, lora_scale(self.stored_alpha, rank, rslora=self.use_rslora)) for rank in ranks)
        shards = ShardShape(self.shards.equivalent_rank, self.shards.per_vector, self.shards.private_rank)
        return LoraShape(self.rank, scale, self.dropout, self.pairs, self.gradient_rule, self.eta, self.nola.bases, shards, of_experts)

    def shape_of_experts(self, moe: "MoeConfig") -> LoraShape:
        """What the pairs of experts are made by. Raises UserError: r cannot be divided as configured."""
        shape = replace(self.shape, chosen=self.experts or ())
        if not self.moe_rank_scaling:
            return shape
        top_k = moe.experts_per_token
        rank, rest = divmod(self.rank, top_k)
        if rest:
            raise UserError(
                f"lora.moe_rank_scaling: lora.r is {self.rank}, which cannot be divided by the {top_k} experts that a token visits\n"
                f"  set lora.r to a multiple of {top_k}, such as {max(rank, 1) * top_k}, or lora.moe_rank_scaling to false"
            )
        return replace(shape, rank=rank, scale=lora_scale(self.stored_alpha, rank, rslora=self.use_rslora))

    @property
    def rank(self) -> int:
        """`r`, or the largest if each expert has its own, to which all pairs are padded."""
        return max(self.r) if isinstance(self.r, tuple) else self.r

    @property
    def stored_alpha(self) -> int:
        """alpha as adapter files hold it: by it and r their readers scale. Where there is no alpha, it is r."""
        if self.alpha is not None:
            return int(self.alpha)
        return self.rank if self.gradient_rule == "row_norm" else DEFAULT_ALPHA


DEFAULT_ALPHA = 32
DEFAULT_EXPERTS, DEFAULT_TOP_K = 8, 2
"""the counts for a base model that has no experts of its own"""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How new routers choose experts. Where the model's own routers stay, or other programs' readers have the softmax router only, all
    keys keep their defaults."""

    input: RouterInput = "token"
    """What an expert is chosen by. token: the token's hidden state, by one linear map. given: the sample's source, so that each item of
    data.train trains an adapter of its own, and an item of data.eval uses the one of the training source of its name. Each adapter then has
    its own mean loss, and its own gradient norm, to which max_grad_norm applies. moe.num_experts is the number of sources, and top_k 1.
    user, with unit linear: the vector that data.features has of the sample's user, by a small gate of each linear (RecLoRA). Every token
    goes to all experts; leave moe.top_k out."""
    temperature: float = field(default=5.0, metadata=key(POSITIVE))
    """With input user: what the gate's logits are divided by before their softmax."""
    mix: Literal["factors", "products"] = "factors"
    """With input user: how an expert's share counts. factors: the A of all experts are added up by the shares, and so are the B, to one
    pair for each sample; every rank then holds all experts in every step. products: the results B A x of the experts are added up."""
    score: RouterScore = "softmax"
    """What an expert's logit becomes. softmax: a share among all experts. sigmoid: a score of its own."""
    bias: Literal["none", "learned", "balancing"] = "none"
    """A number per expert. learned: added to its logit, and trained. balancing: added to its score in the choice; no gradient trains it,
    but after each optimizer step it rises by bias_rate where the expert had less than the mean load, and falls where it had more."""
    bias_rate: float = field(default=1e-5, metadata=key(POSITIVE))
    """With bias balancing: how far the bias moves in a step."""
    bias_in_weights: bool = False
    """With bias balancing: the bias counts in the weights of the chosen experts, too, as in SMoRA's code; false: in the choice alone."""
    dense: bool = False
    """Every token goes to all experts of its layer; leave moe.top_k out."""
    weights: Literal["renormalised", "gate", "one"] = "renormalised"
    """What the results of the chosen experts are multiplied by. renormalised: their scores, divided by the sum of these; with top_k 1 this
    is 1. gate: their scores. one: 1, which needs top_k 1. With a weight that is always 1 the loss of the text trains no router."""
    balance: Literal["batch", "sample"] = "batch"
    """What the load-balancing loss evens out. batch: the loads of each micro-step's tokens of all ranks, as in Mixtral. sample: those of
    each sample by itself, and the mean over the samples of the step, as in LLaVA-MoLE."""

    @property
    def by_user(self) -> bool:
        """Whether the sample's user decides."""
        return self.input == "user"

    @property
    def takes_all(self) -> bool:
        """Whether every token goes to all experts of its layer."""
        return self.dense or self.by_user

    @property
    def mixes(self) -> str:
        """How the experts of a linear become one (`hecate.experts.linear.MIXES`)."""
        if self.by_user:
            return self.mix
        return "separate" if self.input == "given" else "products"


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    family: Family = "mixlora"
    """What an expert computes. mixlora: LoRA pairs over the layer's shared frozen FFN. full: a gated FFN of its own, fully trained, which
    starts as a copy of the dense model's FFN. moe_lora: LoRA pairs over the frozen experts of a model that already has experts."""
    unit: Literal["ffn", "linear"] = "ffn"
    """What gets a router and experts. ffn: each decoder layer's FFN. linear: each linear layer that lora.target_modules names, with LoRA
    pairs as experts beside the frozen linear (MoLA); family must then be left at mixlora."""
    num_experts: int | tuple[int, ...] | None = None
    """The number of experts of every layer, or a list with one number per layer; a layer with 0 keeps its plain FFN, or, with unit
    linear, its linears get one plain LoRA adapter each. With unit linear, 1 means one pair for each linear and no router; it needs top_k 1,
    and the run leaves an ordinary LoRA. null: 8, or, with moe_lora or front_end megatron, the model's own number."""
    allocation: tuple[int, ...] | None = None
    """In place of num_experts: a few numbers of experts, each for an equal share of the layers from the first one on. With [2, 4, 6, 8] the
    first quarter of the layers has 2 each, and the last 8; of 30 layers 8, 7, 8 and 7. null: num_experts says."""
    top_k: int | None = field(default=None, metadata=key(COUNT))
    """Experts that each token goes to. null: 2, or, with moe_lora or front_end megatron, as the model has it; with router.dense or
    router.input user, all."""
    router: RouterConfig = field(default_factory=RouterConfig)
    train_router: bool = field(default=False, metadata=key(family="moe_lora"))
    """With family moe_lora: also train the model's routers. The other families always train their routers."""
    replay: Literal["force", "check"] | None = None
    """What layers do with the experts that each sample of data.train names for its tokens, in the key `routed_experts` (docs/use/data.md).
    force: tokens go to these, and are weighed by the router's own scores of them, which train it as ever (routing replay, R3). check: the
    router chooses, and its assignments that differ are counted (`routing_differs` in metrics.jsonl). null: the key is not read; with
    fssdp.plan replay, force. Held-out data are routed by the router."""
    upcycle_noise: float = field(default=0.01, metadata=key(AT_LEAST_ZERO, family="full"))
    """With family full: normal noise is added to each copied weight, with this share of its matrix's standard deviation. 0: none."""
    router_aux_loss_coef: float = field(default=0.001, metadata=key(AT_LEAST_ZERO))
    """The weight of the load-balancing loss in the training loss. 0: none."""

    @property
    def kind(self) -> ExpertKind:
        """The facts about `family` and `unit`."""
        kind = kind_of(self.family, self.unit)
        assert kind is not None, (self.family, self.unit)
        return kind

    @property
    def one_pair_each(self) -> bool:
        """Whether units are linears with one pair each, so that nothing needs a router and the adapter is an ordinary LoRA."""
        counts = self.num_experts if self.allocation is None else self.allocation
        return self.router.input == "token" and self.kind.one_pair_each(counts if isinstance(counts, tuple) else (counts or 0,))

    @property
    def by_source(self) -> bool:
        """Whether each expert is an adapter of its own, which the samples of one source train."""
        return self.router.input == "given"

    @property
    def trains_routers(self) -> bool:
        """Whether routers are trained: new ones are if they have weights, a model's own ones only with `train_router`."""
        return self.train_router or not (self.kind.of_moe_base or self.by_source or self.one_pair_each)

    @property
    def output(self) -> str:
        """The format in which a finished run is written."""
        return "peft_by_source" if self.by_source else "lora" if self.one_pair_each else self.kind.output

    @property
    def output_folder(self) -> str:
        """Where a finished run is found in its folder."""
        return "adapters" if self.by_source else self.kind.output_folder

    @property
    def experts_per_token(self) -> int:
        """`top_k` as a number, after `load_config` has filled in the default or `of_model` the model's own number."""
        assert self.top_k is not None, "moe.top_k is the model's own, which has not been read yet"
        return self.top_k

    def of_model(self, experts_per_layer: tuple[int, ...], top_k: int) -> "MoeConfig":
        """Return this section with the numbers of a model that already has experts. Raises UserError if the section gives other numbers."""
        alike = len(set(experts_per_layer)) == 1
        experts = experts_per_layer[0] if alike else experts_per_layer
        for name, given, own in (("num_experts", self.num_experts, experts), ("top_k", self.top_k, top_k)):
            if given is not None and given != own and given != experts_per_layer:
                shown = list(given) if isinstance(given, tuple) else given
                raise UserError(
                    f"moe.{name}: {shown}, but the model has {own}, which moe.family {self.family} cannot change\n  leave moe.{name} out"
                )
        return replace(self, num_experts=experts, top_k=top_k)

    def experts_per_layer(self, num_layers: int) -> tuple[int, ...]:
        """Return the number of experts of each of `num_layers` layers.

        Raises:
            UserError: num_experts lists another number of layers, or allocation has more groups than there are layers.
        """
        if self.allocation is not None:
            return allocated(self.allocation, num_layers)
        assert self.num_experts is not None, "moe.num_experts is the model's own, which has not been read yet"
        if isinstance(self.num_experts, int):
            return (self.num_experts,) * num_layers
        if len(self.num_experts) != num_layers:
            raise UserError(
                f"moe.num_experts lists {len(self.num_experts)} layers, but the model has {num_layers}.\n"
                f"Give one number for all layers, or a list of {num_layers}."
            )
        return self.num_experts


def allocated(allocation: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Return the number of experts of each layer: one of the allocation for each of as many groups of neighbouring layers, equally large to
    within one.

    Raises:
        UserError: there are more groups than layers.
    """
    groups = len(allocation)
    if groups > num_layers:
        raise UserError(
            f"moe.allocation has {groups} groups, but the model has {num_layers} layers\n"
            f"  give at most {num_layers} numbers, or moe.num_experts"
        )
    return tuple(allocation[layer * groups // num_layers] for layer in range(num_layers))
