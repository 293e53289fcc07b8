"""The command line every package has: verbs over dataclasses, YAML configuration, one-line errors.

A package's ``cli.py`` is a table of verbs. A verb names a function as ``"module:function"``; the module is imported only when
the verb is used, so ``NAME --help`` needs neither torch nor transformers. The function's annotated parameters are
dataclasses, and their fields are its flags.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import json
import operator
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

# Of the engine's hundred flags, those that people use; --help_all shows the rest.
ENGINE_FLAGS = """
    output_dir num_train_epochs max_steps per_device_train_batch_size learning_rate lr_scheduler_type weight_decay
    warmup_steps gradient_accumulation_steps bf16 torch_compile use_cpu dataloader_num_workers report_to seed
"""

_UNSAFE = "a file is damaged, or is a pickle of more than tensors and plain values, which may run code: it is not read"


def flag(help: str, default: Any = dataclasses.MISSING, positional: bool = False) -> Any:
    """A dataclass field that is a flag: its help line, its default (none: required), whether it goes without ``--name``."""
    metadata = {"help": help.replace("%", "%%"), "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class App:
    """A console script: ``app.command(...)`` for each verb, then ``sys.exit(app())``.

    Exit codes: 0 done; 2 wrong input, told in one line on stderr; 130 interrupted. ``--debug`` shows the traceback.

    Args:
        name: the script's and the distribution's name.
        help: one line.
    """

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self.verbs: dict[str, tuple[str, str]] = {}

    def command(self, verb: str, target: str, help: str) -> None:
        """Add a verb that calls ``target`` ("module:function") with its dataclass parameters filled from the flags."""
        self.verbs[verb] = (target, help)

    def add_study(self, target: str) -> None:
        """Give ``reproduce``, which runs the :class:`papercore.lab.study.Study` at ``target`` ("module:variable")."""
        self.command(
            "reproduce", f"{target}.reproduce", "the paper's comparison side by side: table, plot, JSON; resumable"
        )

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in arguments
        arguments = [a for a in arguments if a != "--debug"]
        try:
            return self._run(arguments)
        except BrokenPipeError:  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            print(f"{self.name}: interrupted; the same command goes on from what is saved", file=sys.stderr)
            return 130
        except (ValueError, OSError, ModuleNotFoundError, RecursionError, UnpicklingError) as error:
            if debug:
                traceback.print_exc()
            else:  # torch's own words for a pickle say how to run it all the same
                said = _UNSAFE if isinstance(error, UnpicklingError) else " ".join(str(error).split())
                print(f"{self.name}: {said}", file=sys.stderr)
            return 2

    def _run(self, arguments: list[str]) -> int:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(self._overview())
            return 0
        if arguments[0] == "--version":
            print(f"{self.name} {importlib.metadata.version(self.name)}")
            return 0
        verb, *flags = arguments
        if verb not in self.verbs:
            raise ValueError(f"no verb {verb!r}{_nearest(verb, self.verbs)}; the verbs are {', '.join(self.verbs)}")
        target, help = self.verbs[verb]
        function = load(target)
        function(*parse(function, flags, f"{self.name} {verb}", help))
        return 0

    def _overview(self) -> str:
        width = max(map(len, self.verbs))
        verbs = "\n".join(f"  {verb:<{width}}  {help}" for verb, (_, help) in self.verbs.items())
        return f"{self.name}: {self.help}\n\n{verbs}\n\n{self.name} VERB --help shows a verb's flags; --debug shows tracebacks."


def load(target: str) -> Any:
    """The object at ``"module:name"`` or ``"module:name.attribute"``."""
    module, name = target.split(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse(function: Callable[..., Any], flags: Sequence[str], prog: str = "", help: str = "") -> list[Any]:
    """Fill the dataclass parameters of ``function`` from ``flags`` and the YAML file that ``--config`` names.

    Flags override the file. A positional :func:`flag` takes the words that have no ``--name``.

    Raises:
        ValueError: for an unknown flag or key (naming the nearest), or a value of the wrong type.
    """
    from transformers import HfArgumentParser, TrainingArguments

    hints = typing.get_type_hints(function)
    types = [hints[name] for name in inspect.signature(function).parameters]
    show_all = "--help_all" in flags
    engine = {f.name for f in dataclasses.fields(TrainingArguments)} - set(ENGINE_FLAGS.split())

    class Parser(HfArgumentParser):
        @staticmethod
        def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
            field = copy.copy(field)
            metadata = dict(field.metadata)
            if metadata.pop("positional", False):
                many = typing.get_origin(field.type) is list
                default = field.default_factory() if callable(field.default_factory) else field.default
                if default is dataclasses.MISSING:
                    parser.add_argument(field.name, nargs="+" if many else None, **metadata)
                else:
                    parser.add_argument(field.name, nargs="*" if many else "?", default=default, **metadata)
                return
            if field.name in engine and not show_all:
                metadata["help"] = argparse.SUPPRESS
            field.metadata = metadata  # type: ignore[assignment]
            HfArgumentParser._parse_dataclass_field(parser, field)

        def error(self, message: str) -> typing.NoReturn:
            raise ValueError(f"{message} (see {self.prog} --help)")

    parser = Parser(types, prog=prog, description=help, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of flags; flags given here override it")
    parser.add_argument("--help_all", action="help", help="show the training engine's other flags, too")
    for type_ in types:
        for name, hint in typing.get_type_hints(type_).items():
            for action in parser._actions:
                if action.dest == name and type(None) in typing.get_args(hint) and callable(action.type):
                    action.type = _optional(action.type)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")  # without a word it is the parser below that complains
    config = first.parse_known_args(flags)[0].config
    tokens = [*(_tokens(config, parser) if config else []), *flags]
    *filled, rest = parser.parse_args_into_dataclasses(tokens, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise ValueError(f"no flag {rest[0]!r}{_nearest(rest[0], parser._option_string_actions)} (see {prog} --help)")
    filled = [value for value in filled if dataclasses.is_dataclass(value)]
    for value in filled:
        for name in [f.name for f in dataclasses.fields(value) if getattr(value, f.name) == [None]]:
            setattr(value, name, None)  # the word none for a list is no list, not a list of none
    return filled


def _optional(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """``convert``, with the word none for None."""

    def read(word: str) -> Any:
        return None if word == "none" else convert(word)

    read.__name__ = getattr(convert, "__name__", "value")
    return read


def _tokens(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML mapping as the flags it stands for, so that both are checked by the same parser."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        entries = yaml.safe_load(text) or {}
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # a few can stand for gigabytes
            raise ValueError("it holds an alias (*): write the value out")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected 'flag: value' lines, found a {type(entries).__name__}")
    actions = {action.dest: action for action in parser._actions}
    tokens: list[str] = []
    for key, value in entries.items():
        if key not in actions:
            raise ValueError(f"{path}: no flag {key!r}{_nearest(str(key), actions)}")
        if isinstance(value, list) and actions[key].nargs in ("+", "*"):
            tokens += [f"--{key}", *map(str, value)]
        else:
            word = "none" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
            tokens.append(f"--{key}={word}")
    return tokens


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One name for each flag, its type once, and no default where it says nothing."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        words = " ".join(action.metavar or action.dest for action in actions if not action.option_strings)
        return f"usage: {self._prog} {words + ' ' if words else ''}[--flag value ...]\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar or action.dest)
        name = action.option_strings[-1] if action.dest == "help" else action.option_strings[0]
        kind = getattr(action.type, "__name__", "") if action.type else ("" if action.nargs == 0 else "str")
        kind = {"string_to_bool": "true|false"}.get(kind, kind)
        if action.choices:
            kind = "|".join(map(str, action.choices))
        return f"{name} {kind}{' ...' if action.nargs == '+' else ''}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").split("\n")[0]
        if action.default in (None, argparse.SUPPRESS, "", []) or action.nargs == 0:
            return text
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{text} [{shown}]"
