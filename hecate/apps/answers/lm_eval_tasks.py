"""Tasks of EleutherAI's lm-evaluation-harness (the package lm-eval), asked of an opened model through the harness's own interface."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hecate.apps.answers.likelihood import known_positions, log_likelihoods
from hecate.apps.answers.opened import Opened
from hecate.engine.protocol import EvaluationPasses
from hecate.errors import UserError, install_hint
from hecate.train.generation import Decoding, generate

_log = logging.getLogger(__name__)

_LONGEST = 2048
"""tokens of a text of a model that does not say how many it knows, as in lm-eval"""
_ANSWER = 256
"""tokens of an answer where a task does not say how many, as in lm-eval"""


@dataclass(frozen=True)
class LmEvalTasks:
    """What is asked."""

    names: tuple[str, ...]
    folder: Path | None = None
    """with YAML files that define tasks; None: lm-eval's own tasks"""
    chat_template: bool = False
    """whether questions are rendered as conversations"""


def require_lm_eval() -> None:
    """Raises UserError: lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks needs lm-eval, which is not installed\n  pip install lm-eval; or {install_hint('lm-eval')}")


def lm_eval_figures(
    opened: Opened, evaluation: EvaluationPasses, tasks: LmEvalTasks, *, batch_size: int, limit: int | None = None
) -> dict[str, tuple[int, dict[str, float]]]:
    """Of each task, subtasks and groups included, the number of questions and lm-eval's figures.

    Args:
        limit: ask only so many questions of each task, the first ones; None: all.

    Raises:
        UserError: lm-eval is not installed, it has no such task, or a text cannot be computed.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if tasks.folder is None else str(tasks.folder), include_defaults=tasks.folder is None)
    if missing := [name for name in tasks.names if name not in manager.all_tasks]:
        known = f"it has {', '.join(sorted(manager.all_tasks)[:10]) or 'none'}" if tasks.folder else "lm-eval ls tasks lists them"
        where = "lm-eval" if tasks.folder is None else str(tasks.folder)
        raise UserError(f"--tasks {missing[0]}: {where} has no such task\n  {known}")
    found = simple_evaluate(
        model=_model(opened, evaluation, batch_size, chat=tasks.chat_template),
        tasks=list(tasks.names),
        task_manager=manager,
        limit=limit,
        apply_chat_template=tasks.chat_template,
        log_samples=False,
        bootstrap_iters=0,
    )
    counts: Mapping[str, Any] = found["n-samples"]
    return {name: (int(counts.get(name, {}).get("effective", 0)), _figures(of_task)) for name, of_task in found["results"].items()}


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Without errors of estimates: `acc` of the key "acc,none", and "exact_match,strict-match" where there is a filter."""
    named = {key.removesuffix(",none"): value for key, value in result.items() if "," in key and "_stderr" not in key}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


def _model(opened: Opened, evaluation: EvaluationPasses, batch_size: int, *, chat: bool) -> Any:
    """The model as lm-eval calls it. Its class needs lm-eval's, so that it is made only when that is there."""
    from lm_eval.api.model import TemplateLM

    return type("LmEvalModel", (_Answers, TemplateLM), {})(opened, evaluation, batch_size, chat)


class _Answers:
    """What lm-eval asks a model for (`lm_eval.api.model.TemplateLM`)."""

    def __init__(self, opened: Opened, evaluation: EvaluationPasses, batch_size: int, chat: bool) -> None:
        super().__init__()
        self._opened, self._evaluation, self._batch_size, self._chat = opened, evaluation, batch_size, chat
        self._base, self._tokenizer = opened.base, opened.base.tokenizer
        self._longest = known_positions(opened.base) or _LONGEST
        self._has_cut = False

    @property
    def eot_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id if self._tokenizer.bos_token_id is None else self._tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begun = self._tokenizer.bos_token is not None and string.startswith(self._tokenizer.bos_token)
        special = not begun if add_special_tokens is None else add_special_tokens
        ids: list[int] = self._tokenizer(string, add_special_tokens=special)["input_ids"]
        return ids

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _texts, context, more in requests:
            # The last token needs no position, since nothing follows it.
            whole = self._shortened(context + more, self._longest + 1)
            if len(whole) <= len(more):
                raise UserError(f"a task has an answer of {len(more)} tokens, but the model knows {self._longest} positions")
            pairs.append((whole[: -len(more)], more))
        found = log_likelihoods(self._base, self._evaluation, pairs, batch_size=self._batch_size)
        return [(one.log, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        sums = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            # A window's context and what follows have a place more than is computed, since the last token predicts nothing.
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._longest, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            sums.append(sum(one.log for one in log_likelihoods(self._base, self._evaluation, pairs, batch_size=self._batch_size)))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for given, numbers in alike.items():
            decoding = replace(_decoding(json.loads(given)), chat=self._chat)
            room = self._longest - decoding.max_new_tokens
            if room < 1:
                raise UserError(f"a task asks for {decoding.max_new_tokens} tokens, but the model knows {self._longest} positions")
            prompts = [self._shortened(self.tok_encode(requests[number].args[0]), room) for number in numbers]
            keys = [str(number) for number in numbers]
            found = generate(
                self._base,
                prompts,
                decoding,
                batch_size=self._batch_size,
                begin=lambda _: self._evaluation.forward(self._opened.tokens([])),
                keys=keys,
            )
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer.raw
        return answers

    def _shortened(self, tokens: list[int], room: int) -> list[int]:
        """The last of these tokens, as many as there is room for."""
        if len(tokens) > room and not self._has_cut:
            self._has_cut = True
            _log.warning(f"hecate: {self._opened.trained}: texts of more than {room} tokens lose their beginning")
        return tokens[-room:]


def _decoding(given: Mapping[str, Any]) -> Decoding:
    """What a task's generation_kwargs say. Raises UserError: they hold something else."""
    until = given.get("until") or []
    known = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "temperature", "top_p", "top_k"}
    if unknown := sorted(given.keys() - known):
        raise UserError(f"a task's generation_kwargs have {unknown[0]}, which hecate does not know; it knows {', '.join(sorted(known))}")
    length = next((int(given[name]) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if given.get(name)), _ANSWER)
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") and "temperature" not in given:
        temperature = 1.0
    return Decoding(
        length,
        temperature if given.get("do_sample", temperature > 0) else 0.0,
        float(given.get("top_p") or 1.0),
        int(given.get("top_k") or 0),
        stop=tuple([until] if isinstance(until, str) else until),
    )
