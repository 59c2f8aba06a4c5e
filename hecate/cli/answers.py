"""Verbs that ask a trained model: generate answers prompts, chat is a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hecate.errors import UserError
from hecate.io.terminal import show_text

if TYPE_CHECKING:
    from hecate.apps.answers.answers import Conversation
    from hecate.train.generation import Decoding

Trained = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, checkpoint, adapter or model, such as runs/quickstart")]
System = Annotated[str | None, typer.Option(help="system message")]
Base = Annotated[str | None, typer.Option(help="base model; default: the one that the adapter names")]
Length = Annotated[int, typer.Option(min=1, help="length of an answer at most")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the most likely token, always; more: sampled")]
TopP = Annotated[float | None, typer.Option(help="sample among the most likely tokens that have this probability together")]
TopK = Annotated[int | None, typer.Option(min=1, help="sample among this many most likely tokens")]
Seed = Annotated[int, typer.Option(help="seed of what is sampled")]
User = Annotated[str | None, typer.Option(help="who asks, for an adapter whose experts are mixed by users")]
Features = Annotated[Path | None, typer.Option(help="the .npz file with the users' features")]


def generate(
    trained: Trained,
    given: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="the user's message; several are asked one by one")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help='JSONL with "prompt" or "messages" in each line; - reads standard input')
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file for the lines of --prompts with their answers")] = None,
    answers: Annotated[int, typer.Option("--answers", "-n", min=1, help="answers to each prompt")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="answers that are computed together")] = 16,
    system: System = None,
    model: Base = None,
    max_new_tokens: Length = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="text before which an answer ends; may be given several times")] = None,
    user: User = None,
    features: Features = None,
) -> None:
    """Answer prompts with a trained adapter and its base model, or with a model as it is (docs/use/answers.md).

    A PROMPT is answered in plain text. With --prompts each line is printed, or written to --out, with its answers.
    """
    _check(given or (), prompts, out, answers, temperature)
    from hecate.config.files.paths import require_trained

    require_trained(trained)
    decoding = _decoding(max_new_tokens, temperature, top_p, top_k, seed, stop or ())
    if prompts is None:
        _require_user(user, features)
    from hecate.apps.answers.answers import answers_to, as_record
    from hecate.apps.answers.inference import answering
    from hecate.data.files.prompts import asked, read_prompts

    if prompts is None:
        wanted = [asked(prompt, system, user) for prompt in given or ()]
    else:
        wanted = list(read_prompts(prompts, sys.stdin.buffer if prompts == "-" else (), system=system, user=user))
    with answering(trained, model=model, user=user, features=features) as opened:
        found = answers_to(opened, iter(wanted), decoding, batch_size=batch_size, count=answers)
        if prompts is not None:
            _write((as_record(one, texts) for one, texts in found), out)
            return
        for prompt, (_, texts) in zip(given or (), found, strict=True):
            if len(given or ()) > 1:
                show_text(f"> {prompt}")
            for number, one in enumerate(texts, start=1):
                show_text(f"[{number}] {one.text}" if answers > 1 else one.text)


def chat(
    trained: Trained,
    system: System = None,
    model: Base = None,
    max_new_tokens: Length = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    user: User = None,
    features: Features = None,
) -> None:
    """Talk with a trained model. /reset begins anew, /exit ends; Ctrl-C breaks off an answer, which then was not given."""
    from hecate.config.files.paths import require_trained

    require_trained(trained)
    decoding = _decoding(max_new_tokens, temperature, top_p, top_k, seed, ())
    _require_user(user, features)
    from hecate.apps.answers.answers import Conversation
    from hecate.apps.answers.inference import answering

    with answering(trained, model=model, user=user, features=features) as opened:
        talk(Conversation(opened, decoding, system=system, user=user), opened.base.tokenizer)


def talk(conversation: Conversation, tokenizer: Any) -> None:
    """Read messages from standard input and print the answers, token by token, until /exit or the end of the input."""
    from transformers import TextStreamer

    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/reset":
            conversation.reset()
            show_text("(forgotten)")
        elif text.strip().startswith("/"):
            show_text(f"{text.split()[0]} is no command: /reset begins anew, /exit ends")
        elif text.strip():
            try:
                answer = conversation.say(text, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
            except KeyboardInterrupt:
                show_text("\n(broken off)")
            else:
                if not answer.finished:
                    show_text("(cut at --max-new-tokens)")


def _decoding(length: int, temperature: float, top_p: float | None, top_k: int | None, seed: int, stop: Iterable[str]) -> Decoding:
    if temperature == 0 and (top_p is not None or top_k is not None):
        name = "--top-p" if top_p is not None else "--top-k"
        raise UserError(f"{name} was given without --temperature: only what is sampled can be narrowed\n  give --temperature 1, or less")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be above 0 and at most 1")
    if "" in (stops := tuple(stop)):
        raise UserError("--stop: an empty text would end every answer before its first token")
    from hecate.train.generation import Decoding

    return Decoding(length, temperature, 1.0 if top_p is None else top_p, top_k or 0, seed, stops)


def _require_user(user: str | None, features: Path | None) -> None:
    if features is not None and user is None:
        raise UserError("--features was given without --user ID; an adapter that decides by users needs both")


def _check(given: Sequence[str], prompts: str | None, out: Path | None, answers: int, temperature: float) -> None:
    if bool(given) == (prompts is not None):
        raise UserError('hecate generate: give a PROMPT, or --prompts FILE.jsonl\n  such as hecate generate runs/qwen "What is FSSDP?"')
    if out is not None and prompts is None:
        raise UserError("--out is for the answers of --prompts; the answer to a PROMPT is printed")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if answers > 1 and temperature == 0:
        raise UserError(f"--answers {answers}: without sampling all answers to a prompt are the same\n  give --temperature 1, or less")


def _write(records: Iterable[str], out: Path | None) -> None:
    if out is None:
        for record in records:
            show_text(record)
        return
    from hecate.io.durable import replace_output

    try:
        replace_output(out, (record.encode() + b"\n" for record in records))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
