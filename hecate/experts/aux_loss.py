"""The load-balancing loss of Mixtral and MixLoRA, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.experts.router import RouterStats
from hecate.parallel.units import Unit


def load_balancing_loss(stats: Mapping[Unit, RouterStats], group: dist.ProcessGroup) -> Tensor:
    """This rank's share of E · sum_{k,e} f_{k,e} · P_e; the shares of all ranks add up to the loss. Balanced routing gives top_k.

    f is the share of tokens whose k-th choice is e, P the mean probability of e, both over the tokens of all ranks and the layers
    with the same number of experts; several such groups are averaged by their number of layers. f carries no gradient. Every rank
    must call it with the same layers; a rank without tokens, too. Source: HF Mixtral's `load_balancing_loss_func`.
    """
    by_shape: dict[tuple[int, ...], list[RouterStats]] = {}
    for unit in sorted(stats):
        by_shape.setdefault(tuple(stats[unit].count_KE.shape), []).append(stats[unit])
    counts = [torch.stack([s.count_KE for s in group_stats]).sum(0) for group_stats in by_shape.values()]
    flat = torch.cat([count.flatten() for count in counts])
    if dist.get_world_size(group) > 1:
        dist.all_reduce(flat, group=group)
    total = torch.zeros((), dtype=next(iter(stats.values())).prob_sum_E.dtype, device=flat.device)
    for (k_e, group_stats), count in zip(by_shape.items(), flat.split([c.numel() for c in counts]), strict=True):
        count_KE = count.view(k_e)
        num_tokens = count_KE[0].sum().clamp(min=1).to(total.dtype)  # times layers
        prob_E = torch.stack([s.prob_sum_E for s in group_stats]).sum(0) / num_tokens
        share_E = count_KE.sum(0).to(total.dtype) / num_tokens
        total = total + len(group_stats) / len(stats) * k_e[1] * (share_E * prob_E).sum()
    return total
