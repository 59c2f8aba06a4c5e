"""Prove a command of a page without running it: its program, verb and options exist, its keys, values, presets and files are accepted."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import typer
from typer.main import get_command

from hecate.adapters.export import form_named
from hecate.adapters.sets.merging import METHODS
from hecate.apps.sweep.sweep_file import load_run_sweep
from hecate.cli import app
from hecate.config import load_config
from hecate.config.files.presets import find_preset, run_presets
from hecate.config.schema import REQUIRED
from hecate.data.files.synthetic_tasks import TASKS
from hecate.parallel.cluster.topology_file import load_topology
from hecate.parallel.cost.model_shapes import load_model_shape
from hecate.parallel.planners import ROWS
from hecate.parallel.simulate.workloads import WORKLOADS
from tests.rooms import ROOT

STANDS_FOR = {"CONFIG": "mixlora", "SWEEP": "examples/sweep/sweep.yaml"}
"""what the pages write for something of the reader's, and what is tried in its place"""
MODELS = {
    "/models/Qwen3-1.7B": "qwen2.5-7b",
    "/models/SmolLM2-1.7B": "llama-3-8b",
    "/models/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "...": "qwen2.5-7b",
}
"""the models that the pages name, and a preset with sizes of the same kind"""
_INSTEAD = {"topology": "h100-node", "data.train": "data.jsonl", "data.eval": "data.jsonl", "output_dir": "runs/first"}
"""for a value that the page leaves open, or a file that another command writes"""
_NAMED = {"topology": "topologies", "model": "models", "sweep": "experiments"}
_UsageError = typer.BadParameter.__base__
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def prove(words: Sequence[str], *, in_sentence: bool = False) -> None:
    """Check a command. `...` stands for what the reader adds.

    Args:
        in_sentence: it is in a sentence, which may leave out what the verb needs.

    Raises:
        AssertionError, UserError or an error of the command line: something in it does not exist.
    """
    for command in _piped(words):
        variables = []
        while command and re.match(r"[A-Za-z_.]+=", command[0]):
            variables.append(command.pop(0))
        if not command:
            _prove_run("mixlora", variables, complete=False)  # keys and values alone
            return
        program, *arguments = command
        proofs: dict[str, Callable[[], None]] = {
            "hecate": lambda given=arguments: _prove_hecate(given, in_sentence),
            "torchrun": lambda given=arguments: _prove_torchrun(given),
            "python": lambda given=arguments: _prove_python(given),
            "make": lambda given=arguments: _prove_make(given),
            "pip": lambda given=arguments: _prove_pip(given),
            "ray": lambda given=arguments: _prove_ray(given),
            "cat": lambda: None,
            ".": lambda given=arguments: _prove_activation(given),
        }
        if program in proofs:
            proofs[program]()
        else:
            _prove_script(program, arguments, variables)


def _piped(words: Sequence[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def _prove_hecate(arguments: list[str], in_sentence: bool) -> None:
    if arguments == ["--version"]:
        return
    verb, *rest = [word for word in arguments if word not in ("...", "[KEY=VALUE", "...]")]
    commands = getattr(get_command(app), "commands")  # noqa: B009  (a group's; typer does not say in its types that it is one)
    assert verb in commands, f"hecate has no verb {verb}"
    command = commands[verb]
    if hasattr(command, "commands"):  # a verb of several verbs
        assert rest, f"hecate {verb} takes another verb"
        assert rest[0] in command.commands, f"hecate {verb} has no verb {rest[0]}"
        command = command.commands[rest.pop(0)]
    try:
        given = command.make_context(verb, list(rest)).params
    except _UsageError as error:
        if in_sentence and re.search("Missing|requires an argument", error.format_message()):
            return
        raise
    overrides = list(given.get("overrides") or ())
    assert not [word for word in overrides if word.startswith("-")], "an option that the verb does not have"
    config = str(given["config"]) if given.get("config") is not None else None
    if verb == "eval" and config is not None and (config.startswith("/models/") or re.fullmatch(r"runs/[a-z-]+", config)):
        config = "runs/first/config.yaml"  # the folder of a model or of a run stands for the configuration
    if config is not None:
        _prove_run(config, overrides, complete="..." not in arguments and verb != "plan" and not in_sentence)
    elif verb == "sweep":
        load_run_sweep(str(ROOT / STANDS_FOR.get(str(given["file"]), str(given["file"]))), overrides)
    elif verb == "export" and given["to"] is not None:
        form_named(given["to"])
    elif verb == "merge":
        assert given["method"] in METHODS, f"no method {given['method']}"
    elif verb == "make-tasks":
        assert set(given["tasks"].split(",")) <= set(TASKS)
    if verb in ("simulate", "plan"):
        _prove_names(verb, given)


def _prove_names(verb: str, given: dict[str, Any]) -> None:
    """The presets, workloads and policies that `simulate` and `plan` name."""
    for option, folder in _NAMED.items():
        if (name := given.get(option)) is not None and not (ROOT / name).is_file():
            find_preset(folder, option, name)
    for name in (given["workload"] or "").split(","):
        assert name in {*WORKLOADS, "all"}, f"no workload {name}"
    if verb == "simulate":
        for name in given["policy"].split(","):
            assert name in {*ROWS, "all"}, f"no policy {name}"
        if given["model"] is not None:
            load_model_shape(find_preset("models", "model", given["model"]))
        if given["topology"] is not None:
            load_topology(find_preset("topologies", "topology", given["topology"]))


def _prove_run(config: str, overrides: Sequence[str], *, complete: bool) -> None:
    """A configuration with what the command line adds is accepted, with a model of the same kind in the place of the reader's.

    Args:
        complete: the command shows all that must be given, unless its configuration is one of the reader's.
    """
    values = dict(one.partition("=")[::2] for one in overrides)
    readers = config.startswith("runs/") or config == "CONFIG"
    name = "mixlora" if readers else STANDS_FOR.get(config, config)
    if readers or not complete:
        values = {"model.name_or_path": "...", "data.train": "...", "output_dir": "runs/first"} | values
    model = values.get("model.name_or_path")
    assert model is None or model in MODELS, f"a model that is not listed in MODELS: {model}"
    replaced = {key: value for key, value in values.items() if key not in ("resume", "lora.init_from")}  # the reader's folders
    if model is not None:
        replaced["model.name_or_path"] = MODELS[model]
    for key, value in _INSTEAD.items():
        if values.get(key) in ("...", "machine.yaml"):
            replaced[key] = value
    _load(str(ROOT / name) if "/" in name else name, tuple(f"{key}={value}" for key, value in replaced.items()))
    if complete and not readers:
        given = {*values, *(key for key in REQUIRED if re.search(rf"(?:^|{{) *{key.rpartition('.')[2]}:", _text(name), re.MULTILINE))}
        given |= {"data.train"} if re.search(r"^ *clients:", _text(name), re.MULTILINE) else set()
        assert set(REQUIRED) <= given, f"also needed: {sorted(set(REQUIRED) - given)}"


@cache
def _load(path: str, overrides: tuple[str, ...]) -> None:
    load_config(path, overrides, claim_output=False, inputs=False)


def _text(config: str) -> str:
    return (ROOT / config if "/" in config else run_presets()[config]).read_text(encoding="utf-8")


def _prove_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    try:
        given = get_args_parser().parse_args(arguments)
    except SystemExit as refused:
        raise AssertionError(f"torchrun refuses {arguments}") from refused
    if given.module:
        assert given.training_script == "hecate", f"torchrun -m {given.training_script}"
        _prove_hecate(given.training_script_args, False)
    else:
        assert given.training_script.endswith(".py")


def _prove_python(arguments: list[str]) -> None:
    """The module or file exists and has these options; `accepts` shows more, in seconds."""
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), f"no file {arguments[0]}"
        return
    module, *rest = arguments[1:]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
        return
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert file.is_file(), f"no module {module}"
    text = file.read_text(encoding="utf-8")
    if "resumable(" in text:  # options that benchmarks share
        text += (ROOT / "benchmarks" / "report.py").read_text(encoding="utf-8")
    for word in rest:
        assert not word.startswith("-") or f'"{word.partition("=")[0]}"' in text, f"{module} has no option {word}"


class _AcceptedError(Exception):
    """The arguments were accepted."""


def accepts(module: str, arguments: list[str]) -> None:
    """Check that a module which reads its arguments with argparse accepts these. It is imported, and left before it does anything.

    Raises:
        AssertionError: it does not, or reads none.
    """
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(self: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
        parse(self, *given, **named)
        raise _AcceptedError

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_leave), mock.patch.object(sys, "argv", [module, *arguments]):
        try:
            runpy.run_module(module, run_name="__main__")
        except _AcceptedError:
            return
        except SystemExit as refused:
            raise AssertionError(f"{module} refuses {arguments}") from refused
    raise AssertionError(f"{module} has read no arguments")


def _prove_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(arguments) <= set(targets), f"the Makefile does not have all of {arguments}"


def _prove_pip(arguments: list[str]) -> None:
    """What is installed is this checkout, a wheel of it, or a package that pyproject.toml lists; an extra is one of ours."""
    assert arguments[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = {name[0].lower() for one in (project["dependencies"], *extras.values()) for text in one if (name := _REQUIREMENT.match(text))}
    for word in [word for word in arguments[1:] if not word.startswith("-")]:
        place, _, named = word.partition("[")
        if place == "." or place.endswith(".whl") or place == project["name"]:
            assert {one for one in named.rstrip("]").split(",") if one} <= set(extras), f"no such extra: {word}"
        else:
            name = _REQUIREMENT.match(word)
            assert name is not None, word
            assert name[0].lower() in listed | {"wandb", "mlflow", "trackio"}, f"pyproject.toml does not list {word}"


def _prove_ray(arguments: list[str]) -> None:
    """Only `ray start` is named. Ray's command line takes seconds to import, and its options are not ours."""
    assert arguments[0] == "start"


def _prove_activation(arguments: list[str]) -> None:
    assert arguments == [".venv/bin/activate"], "the environment that `make install` makes"


def _prove_script(program: str, arguments: list[str], variables: list[str]) -> None:
    """A script of examples/ that can be run, which reads these variables; what follows goes to its configuration."""
    script = ROOT / program
    assert os.access(script, os.X_OK), f"{program} cannot be run"
    text = script.read_text(encoding="utf-8")
    settings = dict(one.partition("=")[::2] for one in variables)
    for name in settings:
        assert re.search(rf"\$\{{?{name}\b|\{{{name}:", text), f"{program} does not read {name}"
    config = settings.get("CONFIG", f"{Path(program).parent}/config.yaml")
    if arguments or "CONFIG" in settings:
        _prove_run(config, [word for word in arguments if word != "..."], complete=False)
