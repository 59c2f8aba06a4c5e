"""Pairs that are sums of drawn matrices, whose coefficients alone are trained (NOLA, arXiv 2310.02556).

    A = A0 + (a_1 U_1 + ... + a_K U_K) / sqrt(K)        B = (b_1 V_1 + ... + b_K V_K) / sqrt(K)

Shapes: S slots, C elements of a chunk, K bases, r rank, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn
from weakref import WeakValueDictionary

from hecate.errors import UserError
from hecate.experts.pairs.gradient_rules import ruled_pairs
from hecate.experts.pairs.source_facts import SourceFacts
from hecate.experts.pairs.sources.plain import plain_pairs
from hecate.experts.seeding import combined_digest, digest_of_drawn, generator, linear_weight
from hecate.parallel.values.expert_kinds import LoraShape, PairSizes, UnitSizes
from hecate.parallel.values.layout import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hecate.experts.family import Site
    from hecate.kernels.common.low_rank import LowRankPairs


def nola_pairs(sizes: UnitSizes, projections: Iterable[str], lora: LoraShape) -> PairSizes:
    """Of pairs that are sums of drawn matrices (NOLA, arXiv 2310.02556): the coefficients of A and those of B are trained."""
    whole, trained, seeded = plain_pairs(sizes, projections, lora), [], []
    for a, b in zip(whole.trained[::2], whole.trained[1::2], strict=True):
        name = a.name.removesuffix(".A")
        trained += [TensorSpec(f"{name}.a", (lora.bases,)), TensorSpec(f"{name}.b", (lora.bases,))]
        seeded += [
            TensorSpec(f"{name}.A0", a.shape),
            TensorSpec(f"{name}.U", (lora.bases, *a.shape)),
            TensorSpec(f"{name}.V", (lora.bases, *b.shape)),
        ]
    return PairSizes(tuple(trained), whole.flops, tuple(seeded), seeded_of_model=True, computed_numel=whole.trained_numel)


class DrawnTensor:
    """A0, U or V of a projection, which all units of a process share that need the same one."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @cached_property
    def digest(self) -> str:
        return digest_of_drawn([self.values])


_SHARED: WeakValueDictionary[tuple[int, TensorSpec, torch.dtype, torch.device], DrawnTensor] = WeakValueDictionary()


def drawn_tensor(seed: int, spec: TensorSpec, dtype: torch.dtype, device: torch.device) -> DrawnTensor:
    """A tensor of `nola_pairs`, drawn from the seed and from its name and shape: Kaiming uniform for A0, and U(-1, 1) for U and V.

    The CPU draws it in float64, and then it is rounded and moved, so that ranks of any device have the same. It is drawn once in a process.
    """
    import torch

    key = (seed, spec, dtype, device)
    if (found := _SHARED.get(key)) is not None:
        return found
    source = generator(seed, "nola", spec.name, *spec.shape)
    if spec.name.endswith(".A0"):
        values = linear_weight(spec.shape[0], spec.shape[1], source)
    else:
        values = torch.empty(spec.shape, dtype=torch.float64).uniform_(-1, 1, generator=source)
    return _SHARED.setdefault(key, DrawnTensor(values.to(device=device, dtype=dtype)))


class Nola:
    """A `PairSource`: a chunk holds the coefficients of U and of V of each projection, 2 K numbers, whatever the projection's size.

    A0, U and V are the same for all layers and experts of a model. Every rank draws them, so they take no room in a chunk, never travel and
    have no moments. Two products a projection make the pairs of all slots, and autograd keeps the bases for them, and nothing of a chunk.
    """

    def __init__(self, site: Site, lora: LoraShape, projections: tuple[str, ...]) -> None:
        assert projections, "an expert needs an adapter on at least one projection"
        assert lora.gradient_rule == "none", "rows of A and B have no gradients of their own"
        self.lora = lora
        self.sizes = nola_pairs(site.sizes, projections, lora)
        self.projections = tuple(spec.name.removesuffix(".a") for spec in self.sizes.trained[::2])
        self._drawn = [drawn_tensor(site.seed, spec, site.master_dtype, site.device) for spec in self.sizes.seeded]

    @property
    def drawn(self) -> dict[str, Tensor]:
        """A0 [r, I], U [K, r, I] and V [K, O, r] of each projection, by the names that `sizes.seeded` gives them."""
        return {spec.name: drawn.values for spec, drawn in zip(self.sizes.seeded, self._drawn, strict=True)}

    @property
    def drawn_digest(self) -> str:
        return combined_digest(drawn.digest for drawn in self._drawn)

    def initial(self, expert: int, *key: int | str) -> Tensor:
        """Zeros: A is A0 and B is zero, so that an expert begins as the base."""
        import torch

        return torch.zeros(self.sizes.trained_numel, dtype=torch.float64)

    def stacked(self, replicas_SC: Tensor, expert_S: Tensor) -> dict[str, LowRankPairs]:
        """New tensors: the pairs that the coefficients in each slot make."""
        pairs, factor = {}, self.lora.bases**-0.5
        coefficients = replicas_SC.split(self.lora.bases, dim=1)
        of_projections = zip(coefficients[::2], coefficients[1::2], self._drawn[::3], self._drawn[1::3], self._drawn[2::3], strict=True)
        for name, (a_SK, b_SK, *drawn) in zip(self.projections, of_projections, strict=True):
            a0_rI, u_KrI, v_KOr = (each.values.to(replicas_SC.dtype) for each in drawn)
            a_SrI = a0_rI.flatten().addmm(a_SK, u_KrI.flatten(1), alpha=factor).view(-1, *a0_rI.shape)
            b_SOr = ((b_SK * factor) @ v_KOr.flatten(1)).view(-1, *v_KOr.shape[1:])
            pairs[name] = ruled_pairs(self.lora, a_SrI, b_SOr)
        return pairs

    def chunk_of(self, expert: int, pairs: dict[str, tuple[Tensor, Tensor]]) -> NoReturn:
        """Raises UserError: A and B of an adapter do not say by which coefficients they were made."""
        raise UserError(
            "lora.pairs: nola: training cannot begin with an adapter's A and B, which do not say by which coefficients they were made\n"
            "  leave lora.init_from out, or use lora.pairs=plain, which trains the adapter's own A and B on"
        )


SOURCE = SourceFacts(sizes=nola_pairs, make=Nola, draws=True)
