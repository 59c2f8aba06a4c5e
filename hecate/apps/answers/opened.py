"""Open what a run has left, an adapter, a checkpoint or a whole model, with its base model, for evaluation and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hecate.adapters.format_table import format_of
from hecate.adapters.formats.whole_model import is_model_folder, load_plain_model
from hecate.apps.answers.bake_user import require_width
from hecate.apps.answers.checkpointed import is_checkpoint, model_of_checkpoint
from hecate.apps.answers.trained import find_trained
from hecate.config.files.paths import is_gguf_name
from hecate.data.chat.templates import template_beside
from hecate.data.files.user_features import UserFeatures
from hecate.errors import UserError
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_users import users_of_rows
from hecate.model.base import BaseChoice, BaseModel
from hecate.model.files.load import resolve_model
from hecate.model.moe_model import MoeModel
from hecate.ranks.ranks import Ranks
from hecate.train.build import on_device


@dataclass(frozen=True)
class Opened:
    """A model that answers: what was trained, its base model, and the users by whom its experts are mixed."""

    trained: Path
    base: BaseModel
    moe: MoeModel
    ranks: Ranks
    users: UserFeatures | None = None
    """None: nothing depends on users"""

    @property
    def chats(self) -> bool:
        """Whether prompts are rendered as conversations. A whole model whose tokenizer has no chat template goes on with plain text."""
        return bool(self.base.tokenizer.chat_template) or not (is_model_folder(self.trained) or is_gguf_name(str(self.trained)))

    def tokens(self, users: Sequence[str | None]) -> PassTokens:
        """Of a pass whose rows are these users'. Raises UserError: a user is missing or unknown, or nothing depends on users."""
        if self.users is None:
            if (user := next((one for one in users if one is not None), None)) is not None:
                raise UserError(
                    f"{self.trained}: a prompt names the user {user[:80]!r}, but no features were given\n  give --features FILE.npz"
                )
            return PassTokens()
        if None in users:
            raise UserError(f'{self.trained}: its experts are mixed by the user, so that each prompt needs one: --user, or the key "user"')
        rows = [self.users.row(user) for user in users if user is not None]
        return PassTokens(users=users_of_rows(on_device(self.users, self.ranks), torch.tensor(rows, device=self.ranks.device)))


def open_trained(trained: Path, ranks: Ranks, choice: BaseChoice, users: UserFeatures | None = None) -> Opened:
    """Load what was trained and its base model.

    Raises:
        UserError: there is no such folder, the adapter does not fit the model, or there is no room for the model; users are missing or
            superfluous; or each source of the training data has an adapter of its own.
    """
    while True:
        found = find_trained(trained)
        try:
            base, moe = load_trained(found, ranks, choice)
        except UserError:
            if found.exists() or found == trained:
                raise
            continue  # a run that goes on has deleted this checkpoint meanwhile, and has a newer one
        return as_opened(found, base, moe, ranks, users)


def as_opened(found: Path, base: BaseModel, moe: MoeModel, ranks: Ranks, users: UserFeatures | None = None) -> Opened:
    """What was loaded, for answers. Raises UserError: of users and sources, as `open_trained`."""
    require_users(found, moe, users)
    if moe.separate_experts > 1:
        raise UserError(
            f"{found}: has an adapter for each source of its training data, and a prompt does not say of which source it is\n"
            f"  hecate export {found} OUT writes them; give the folder of one, OUT/SOURCE"
        )
    return Opened(found, base, moe, ranks, users)


def load_trained(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    """Load what `find_trained` has found. Raises UserError: as `open_trained`, but for users and sources."""
    if is_gguf_name(str(folder)):
        return load_plain_model(resolve_model(str(folder)), ranks, choice.dtype, choice.attention)
    if is_checkpoint(folder):
        return model_of_checkpoint(folder, ranks, choice)[1:]
    base, moe = with_adapter(folder, ranks, choice)
    return base if is_model_folder(folder) else in_template_beside(folder, base), moe


def in_template_beside(folder: Path, base: BaseModel) -> BaseModel:
    """The base model of an adapter with the chat template that lies beside the adapter, in which it was trained, if there is one.

    Raises:
        UserError: the file cannot be read.
    """
    template = template_beside(folder)
    return base if template is None else base.with_chat_template(template)


def with_adapter(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    """Load an adapter of any format into its base model, or a whole model. Raises UserError: as `load_trained`."""
    return format_of(folder).open_for_answers(folder, ranks, choice)


def require_users(trained: Path, moe: MoeModel, users: UserFeatures | None) -> None:
    """Raises UserError: the routers decide by users and there are none, or the other way around, or their widths differ."""
    if users is None and moe.user_width is not None:
        raise UserError(
            f"{trained}: its experts are mixed by the user, so that the user's features are needed\n"
            "  generate: give --user ID and --features FILE.npz; eval: the configuration of the training has data.features"
        )
    if users is not None and moe.user_width is None:
        raise UserError(f"{trained}: nothing in it depends on the user\n  leave the features out, and moe.router.input=user")
    if users is not None and moe.user_width is not None:
        require_width(f"{trained}", moe.user_width, users.width)
