"""From hidden states to the loss, without ever holding all logits.

The head is frozen, so the gradient of the hidden states can be computed chunk by chunk while the logits are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hecate.errors import UserError

_CHUNK_ROWS = 512


class LanguageModelHead:
    """A causal LM taken apart into its decoder and its frozen output projection (with the soft cap that Gemma 2 puts on logits)."""

    def __init__(self, model: Any) -> None:
        self.decoder: nn.Module = model.get_decoder()
        self._project: nn.Module = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._check(model)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]. The mask is bool [B, 1, S, S], true where a query may look; None: causal."""
        outputs = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
        )
        return outputs.last_hidden_state

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary]."""
        logits = self._project(hidden_ND)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def loss_sum(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        """Summed cross-entropy of N label tokens, in float32 or wider; differentiable in the hidden states once."""
        return _ChunkedCrossEntropy.apply(hidden_ND, target_N, self)

    def _check(self, model: Any) -> None:
        ids = torch.arange(4, device=next(model.parameters()).device)[None] % model.config.vocab_size
        was_training = model.training
        model.eval()
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            parts = self.logits(self.decoder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state)
        model.train(was_training)
        if whole.shape != parts.shape or float((whole - parts).abs().max()) > 1e-2 * float(whole.abs().max()):
            raise UserError(
                f"unsupported architecture: {type(model).__name__} does more between its decoder and its logits than one projection"
            )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: LanguageModelHead) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grads = []
        for hidden, target in zip(hidden_ND.split(_CHUNK_ROWS), target_N.split(_CHUNK_ROWS), strict=True):
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                logits = head.logits(leaf)
            # softmax - onehot, in the memory of the logits: log_softmax and its backward would take three more buffers of their size,
            # and logsumexp another exponential of them all.
            grad = logits.detach().to(wide)
            top = grad.amax(1, keepdim=True)
            label = grad.gather(1, target[:, None])
            sum_exp = grad.sub_(top).exp_().sum(1, keepdim=True)
            total += (sum_exp.log() + top - label).sum()
            if ctx.needs_input_grad[0]:
                grad.mul_(sum_exp.reciprocal())
                grad.scatter_add_(1, target[:, None], -torch.ones_like(top))
                grads += torch.autograd.grad(logits, leaf, grad.to(logits.dtype))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden_ND))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None
