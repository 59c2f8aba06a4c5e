"""From hidden states to the loss, without ever holding all logits.

Gradients of the hidden states, and of a head that is trained, are computed chunk by chunk while the logits are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hecate.data.batches import PackedSamples, packed_samples
from hecate.errors import UserError
from hecate.model.layers.attention import Way, row_multiple, use_way
from hecate.model.layers.attention_kernels import AttentionRows

_CHUNK_ROWS = 512

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""A function of logits [N, vocabulary] and labels, int64 [N], that returns each label token's loss, [N], and is differentiable."""


class CausalHead(Protocol):
    """A causal language model taken apart: hidden states, and the loss of some of them."""

    def own_positions(self, length: int) -> slice:
        """The positions, of sequences of `length` tokens, that the layers of this rank compute. Each position is computed by some rank."""

    def row_multiple(self, seq_len: int) -> int:
        """The number of positions to a multiple of which the rows of batches are best padded, where none is longer than `seq_len`."""

    def hidden(self, input_ids: Tensor, samples: PackedSamples | None, position_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]. Tokens attend to earlier tokens of their own sample alone.

        Args:
            samples: of packed sequences; None: no sequence has more than one sample, and padding comes behind it.
            position_ids: each token's position in its sample, from 0.
        """

    def loss_sum(self, hidden_ND: Tensor, target_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """Summed cross-entropy of N label tokens, in float32 or wider; differentiable once, also in a projection that trains. Where ranks
        share the vocabulary, this rank's share of the sum.

        Args:
            weight_N: of each token in the sum; None: 1.
        """


class LanguageModelHead:
    """A causal LM taken apart into its decoder and its output projection (with the factor of Cohere's logits, the divisor of
    Granite's, and the soft cap of Gemma 2's).

    Args:
        way: in which layers compute attention; None: as transformers does by itself.

    Raises:
        UserError: the model does not give its decoder, has a part more, or the samples of packed rows see each other.
    """

    def __init__(self, model: Any, way: Way | None = None) -> None:
        self.decoder: nn.Module = model.get_decoder()
        if self.decoder is model:  # as transformers' Llama 4 does
            raise UserError(f"unsupported architecture: {type(model).__name__} does not say which of its parts is the decoder")
        self._project: nn.Module = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._factor: float = getattr(model.config, "logit_scale", None) or 1.0
        self._divisor: float = getattr(model.config, "logits_scaling", None) or 1.0
        self._way = way
        self._device: torch.device = next(model.parameters()).device
        self.token_loss: TokenLoss | None = None
        """The loss of label tokens; None: their cross-entropy, in less memory."""
        if way is not None:
            use_way(model, way)
        self._check(model)

    def own_positions(self, length: int) -> slice:
        return slice(length)

    def row_multiple(self, seq_len: int) -> int:
        """To a multiple of how many positions rows are padded; see `hecate.model.layers.attention`."""
        return row_multiple(self._way, self._device, seq_len)

    def hidden(self, input_ids: Tensor, samples: PackedSamples | None, position_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]; see `CausalHead.hidden`. With a way of ours the host does not wait for the device.

        By itself transformers finds the samples where the positions begin again, and makes the masks that its layers need. For that it
        asks the device whether there is more than one sample.
        """
        rows: dict[str, AttentionRows] = {}
        if self._way is not None:
            rows["attention_rows"] = AttentionRows(samples, input_ids.shape[0], input_ids.shape[1], input_ids.device)
        outputs = self.decoder(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
            **rows,
        )
        return outputs.last_hidden_state

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary]."""
        logits = self._project(hidden_ND)
        if self._factor != 1:
            logits = logits * self._factor
        if self._divisor != 1:
            logits = logits / self._divisor
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def loss_sum(self, hidden_ND: Tensor, target_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """Summed loss of N label tokens, in float32 or wider; differentiable once, also in a projection that trains."""
        if self.token_loss is not None:
            return summed_token_loss(hidden_ND, target_N, self.logits, self.token_loss, weight_N)
        trained = [parameter for parameter in self._project.parameters() if parameter.requires_grad]
        return chunked_cross_entropy(hidden_ND, target_N, self.logits, trained, weight_N=weight_N)

    def _check(self, model: Any) -> None:
        ids = torch.arange(4)[None].to(self._device) % model.config.vocab_size
        position = torch.arange(4)[None]
        halves = packed_samples(position // 2 + 1)
        halves = replace(halves, segment_ids=halves.segment_ids.to(self._device), bounds=halves.bounds.to(self._device))
        position = position.to(self._device)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            parts = self.logits(self.hidden(ids, None, position))
            packed = self.logits(self.hidden(ids, halves, position % 2))[:, 2:]
            alone = self.logits(self.hidden(ids[:, 2:], None, position[:, :2]))
        model.train(was_training)
        if whole.shape != parts.shape or float((whole - parts).abs().max()) > 1e-2 * float(whole.abs().max()):
            raise UserError(
                f"unsupported architecture: {type(model).__name__} does more between its decoder and its logits than one projection, "
                "a factor and a soft cap"
            )
        if float((packed - alone).abs().max()) > 1e-2 * float(whole.abs().max()):
            raise UserError(f"unsupported architecture: in {type(model).__name__} the samples of a packed sequence see each other")


def head_with_loss(head: CausalHead, loss: TokenLoss | None) -> CausalHead:
    """The head with another loss of label tokens; None: as it is. Raises UserError: it does not give whole rows of logits."""
    if loss is None:
        return head
    if not isinstance(head, LanguageModelHead):
        raise UserError("loss: a Megatron model's ranks share the vocabulary, so that none has a token's logits\n  leave the loss out")
    other = copy(head)
    other.token_loss = loss
    return other


def summed_token_loss(
    hidden_ND: Tensor, target_N: Tensor, logits_of: Callable[[Tensor], Tensor], loss: TokenLoss, weight_N: Tensor | None = None
) -> Tensor:
    """Summed loss of N label tokens, in float32 or wider. The backward pass computes logits again, so that few are held at once.

    Args:
        logits_of: [n, D] -> [n, vocabulary].
        weight_N: of each token in the sum; None: 1.

    Raises:
        UserError: `loss` gives something else than a number for each token.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)

    def of_chunk(hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        losses = loss(logits_of(hidden), target)
        if not isinstance(losses, Tensor) or losses.shape != target.shape:
            got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"loss: must return the loss of each of {len(target)} label tokens, got {got}\n  with cross_entropy: reduction='none'"
            )
        return (losses.to(wide) * weight).sum()

    weights = hidden_ND.new_ones(len(target_N), dtype=wide) if weight_N is None else weight_N.to(wide)
    total = hidden_ND.new_zeros((), dtype=wide)
    for chunk in zip(hidden_ND.split(_CHUNK_ROWS), target_N.split(_CHUNK_ROWS), weights.split(_CHUNK_ROWS), strict=True):
        total = total + checkpoint(of_chunk, *chunk, use_reentrant=False)
    return total


@dataclass(frozen=True)
class VocabularyPart:
    """The consecutive tokens whose logits a rank has, where others have the rest, as many each."""

    first: int
    group: dist.ProcessGroup


def chunked_cross_entropy(
    hidden_ND: Tensor,
    target_N: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    trained: Sequence[nn.Parameter] = (),
    part: VocabularyPart | None = None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy of N label tokens, in float32 or wider; differentiable once, in the hidden states and `trained`.

    Args:
        logits_of: [n, D] -> [n, vocabulary], or this rank's part of the vocabulary.
        trained: the parameters that `logits_of` uses and that get gradients.
        part: where ranks share the vocabulary. Each gives the same hidden states and gets an equal share of the sum; the gradient of the
            hidden states is what comes through its own logits, to be added up over the group.
        weight_N: of each token in the sum; None: 1.
    """
    if not torch.is_grad_enabled():
        # A parameter says under no_grad, too, that it requires a gradient.
        hidden_ND, trained = hidden_ND.detach(), ()
    return _ChunkedCrossEntropy.apply(hidden_ND, target_N, logits_of, part, weight_N, *trained)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        target_N: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        part: VocabularyPart | None,
        weight_N: Tensor | None,
        *trained: nn.Parameter,
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grads = []
        # Summed over the chunks in float32 or wider, whatever the type of what trains.
        trained_grads = [torch.zeros_like(parameter, dtype=wide) for parameter in trained] if any(ctx.needs_input_grad) else []
        chunks = hidden_ND.split(_CHUNK_ROWS)
        weights = [None] * len(chunks) if weight_N is None else weight_N.to(wide)[:, None].split(_CHUNK_ROWS)
        for hidden, target, weight_n1 in zip(chunks, target_N.split(_CHUNK_ROWS), weights, strict=True):
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                logits = logits_of(leaf)
            # softmax - onehot, in the memory of the logits: log_softmax and its backward would take three more buffers of their size,
            # and logsumexp another exponential of them all.
            grad = logits.detach().to(wide)
            top = _over_vocabulary(grad.amax(1, keepdim=True), part, dist.ReduceOp.MAX)
            column, is_own = _own_labels(target[:, None], grad.shape[1], part)
            label = grad.gather(1, column) * is_own
            sum_exp = grad.sub_(top).exp_().sum(1, keepdim=True)
            label, sum_exp = _over_vocabulary(torch.stack([label, sum_exp]), part, dist.ReduceOp.SUM)
            loss_n1 = sum_exp.log() + top - label
            total += (loss_n1 if weight_n1 is None else loss_n1 * weight_n1).sum()
            if any(ctx.needs_input_grad):
                grad.mul_(sum_exp.reciprocal())
                grad.scatter_add_(1, column, -is_own.to(wide))
                if weight_n1 is not None:
                    grad.mul_(weight_n1)
                of_hidden, *of_trained = torch.autograd.grad(logits, [leaf, *trained], grad.to(logits.dtype))
                grads.append(of_hidden)
                for trained_grad, of_chunk in zip(trained_grads, of_trained, strict=True):
                    trained_grad += of_chunk
            del logits, grad  # else they would be held beside the next chunk's
        if any(ctx.needs_input_grad):
            ctx.trained_dtypes = [parameter.dtype for parameter in trained]
            ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden_ND), *trained_grads)
        return total if part is None else total / dist.get_world_size(part.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, *trained_grads = ctx.saved_tensors
        of_trained = [_scaled(grad, grads[0], dtype) for grad, dtype in zip(trained_grads, ctx.trained_dtypes, strict=True)]
        return _scaled(grad_ND, grads[0], grad_ND.dtype), None, None, None, None, *of_trained


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times a scalar, rounded once: in bfloat16 a rounded factor would be wrong by up to 0.4 % for all values alike."""
    # A factor without a dimension would take part in the product in the gradient's type, on a GPU after being rounded to it.
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad, dtype=dtype))


def _over_vocabulary(values: Tensor, part: VocabularyPart | None, op: dist.ReduceOp.RedOpType) -> Tensor:
    if part is not None:
        dist.all_reduce(values, op=op, group=part.group)
    return values


def _own_labels(target_N1: Tensor, width: int, part: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """Each label's column among this rank's, and whether this rank has the label at all."""
    if part is None:
        return target_N1, torch.ones_like(target_N1, dtype=torch.bool)
    column = target_N1 - part.first
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
