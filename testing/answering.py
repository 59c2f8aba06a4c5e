"""What was trained, asked and evaluated in this process, in one call."""

from __future__ import annotations

from pathlib import Path

from hecate.apps.answers.answers import answers_to
from hecate.apps.answers.compare import Questions
from hecate.apps.answers.inference import answering, evaluate_models
from hecate.config import Config
from hecate.data.files.prompts import asked
from hecate.train.generation import Decoding


def evaluate_trained(config: Config, trained: Path) -> None:
    """Print held-out loss and, with eval.generate, exact accuracy of each source of data.eval.

    Raises:
        UserError: no data.eval, no such folder, the adapter does not fit the model, or there is no room for the model.
    """
    evaluate_models(config, [str(trained)], Questions())


def answer(
    trained: Path,
    prompt: str,
    *,
    system: str | None,
    model: str | None,
    max_new_tokens: int,
    user: str | None = None,
    features: Path | None = None,
) -> str:
    """The greedy answer to one prompt in the tokenizer's chat template; a model without one goes on with the prompt as plain text.

    Raises:
        UserError: as `answering`; or there is a system message and no chat template.
    """
    with answering(trained, model=model, user=user, features=features) as opened:
        prompts = iter([asked(prompt, system, user)])
        ((_, (found,)),) = answers_to(opened, prompts, Decoding(max_new_tokens), batch_size=1)
        return found.text
