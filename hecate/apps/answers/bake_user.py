"""Make an ordinary LoRA of an adapter whose experts are mixed by users: the one of a single user, in PEFT's format.

Shapes: E experts, r rank, I inputs and O outputs of a linear, F numbers of a user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.folder import CHAT_TEMPLATE, save_adapter
from hecate.adapters.format_table import format_of, read_adapter
from hecate.adapters.formats.linears import FORMAT, LinearsDescription, gated_paths, pair_names, plain_paths, router_name
from hecate.adapters.peft.description import LoraDescription, linear_names
from hecate.config import RouterConfig
from hecate.errors import UserError
from hecate.experts.pass_users import users_of_rows
from hecate.experts.routers.by_input.user import UserRouter
from hecate.experts.routers.router import RouterSite
from hecate.parallel.values.units import Unit


def bake_user(folder: Path, out: Path, user: str, vector_F: Tensor) -> None:
    """Write the new folder `out` with the LoRA that the adapter in `folder` is for one user. PEFT reads it, and gives the same logits.

    Its rank is r, or the experts' number times r where their products are mixed. What B A x is multiplied by is in B.

    Raises:
        UserError: the adapter cannot be read, is mixed by other things than users or by users of another width; `out` exists.
    """
    not_mixed = UserError(
        f"{folder}: its experts are not mixed by users, so that a user does not make one LoRA of them\n"
        "  a router that decides by tokens has no plain LoRA as its equal"
    )
    if format_of(folder) is not FORMAT:
        raise not_mixed
    adapter = read_adapter(folder)
    tensors, description = adapter.tensors, adapter.description
    assert isinstance(description, LinearsDescription)
    router, width = description.router, description.user_width(tensors)
    if not router.by_user or width is None:
        raise not_mixed
    require_width(f"{folder}", width, len(vector_F))
    terms = {path: _mixed(tensors, path, router, vector_F) for path in gated_paths(tensors)}
    for path in plain_paths(tensors):
        name_a, name_b = pair_names(path, None)
        terms[path] = tensors[name_a], tensors[name_b]
    rank = max(len(a_rI) for a_rI, _ in terms.values())
    written: dict[str, Tensor] = {}
    for path, (a_rI, b_Or) in terms.items():
        name_a, name_b = linear_names(path)
        missing = rank - len(a_rI)  # rows of A and columns of B that add nothing, since PEFT has one rank for all
        written[name_a] = torch.nn.functional.pad(a_rI, (0, 0, 0, missing)).contiguous()
        written[name_b] = torch.nn.functional.pad(description.scale * b_Or, (0, missing)).contiguous()
    kept = {name: value for name, value in description.extra.items() if name == CHAT_TEMPLATE}
    save_adapter(
        out,
        written,
        LoraDescription(
            base_model_name_or_path=description.base_model_name_or_path,
            r=rank,
            alpha=rank,
            target_modules=description.target_modules,
            dropout=description.dropout,
            extra={"user": user, **kept},
        ),
    )


def require_width(what: str, trained: int, given: int) -> None:
    """Raises UserError: gates that were trained for vectors of `trained` numbers are given some of another width."""
    if trained != given:
        raise UserError(
            f"{what}: its gates were trained for users of {trained} numbers, but the features have {given}\n"
            "  give the features of the recommender that the training had"
        )


def _mixed(tensors: Mapping[str, Tensor], path: str, choices: RouterConfig, vector_F: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of one linear for one user."""
    like = tensors[router_name(path, "out.weight")]
    experts = len(like)
    site = RouterSite(
        unit=Unit(0),
        hidden=0,
        num_experts=experts,
        top_k=experts,
        seed=0,
        dtype=like.dtype,
        device=like.device,
        choices=choices,
        user_width=len(vector_F),
    )
    router = UserRouter(site)
    router.load_state_dict({name: tensors[router_name(path, name)] for name in router.trained})
    with torch.no_grad():
        (weight_E,) = router.weights(users_of_rows(vector_F[None], torch.zeros(1, dtype=torch.int64)))
    pairs = [pair_names(path, expert) for expert in range(experts)]
    a_ErI, b_EOr = (torch.stack([tensors[names[matrix]] for names in pairs]) for matrix in (0, 1))
    return _MIXED[choices.mix](weight_E.to(a_ErI.dtype), a_ErI, b_EOr)


def _one_pair(weight_E: Tensor, a_ErI: Tensor, b_EOr: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("e,eri->ri", weight_E, a_ErI), torch.einsum("e,eor->or", weight_E, b_EOr)


def _side_by_side(weight_E: Tensor, a_ErI: Tensor, b_EOr: Tensor) -> tuple[Tensor, Tensor]:
    return a_ErI.flatten(0, 1), (weight_E[:, None, None] * b_EOr).permute(1, 0, 2).flatten(1)


_MIXED: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {"factors": _one_pair, "products": _side_by_side}
"""the pair that the experts' pairs come to with these weights, by the name in `hecate.experts.linear.MIXES`"""
