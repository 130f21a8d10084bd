"""A script's settings: defaults < job file < dry run < command line, with one-line errors.

jsonargparse does the parsing and the types; this module finds the file and the nearest name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from runfolder.errors import UserError, did_you_mean
from train.engine.training_arguments import OURS

Config = TypeVar("Config")


def parse(
    config_class: type[Config], argv: list[str], *, prog: str, dry_run: dict[str, Any]
) -> Config:
    """Return `config_class` filled from `argv`; `--config FILE` names a job or a settings file.

    `dry_run` holds the settings (nested as in a file) that `--dry_run` puts between the file and
    the command line. `--help` prints the settings and exits 0.

    Raises:
        UserError: a file, a key or a value that is wrong, with the nearest name that exists.
    """
    hints = _hints(config_class)
    path, options = _take_config_file(_with_switch_values(argv, hints))
    _check_options(options, hints)
    parser = _parser(config_class, prog, with_help=not {"-h", "--help"}.isdisjoint(options))
    settings = _read_settings(path, config_class) if path else {}

    def values(*layers: dict[str, Any]) -> Namespace:
        found: Namespace | None = None
        where = f"{path}: "
        try:
            for layer in layers:
                found = parser.parse_object(layer, namespace=found)
            where = "--"
            return parser.parse_args(options, namespace=found)
        except ArgumentError as error:
            raise UserError(_explain(str(error), where, hints)) from None

    parsed = values(settings)
    # A file that says `dry_run: true` is a run's config.yaml: it has these settings already, and
    # what the command line changed in them.
    if gives(options, "dry_run") and parsed["dry_run"]:
        parsed = values(settings, dry_run)
    del parsed["config"]
    if settings.get("staged"):
        _check_unchanged(options, values_of_file=settings, parsed=parsed, hints=hints)
    try:
        return _build(config_class, parsed)
    except UserError as error:
        name = str(error).partition(":")[0]
        in_file = path and name in hints
        where = "--" if gives(options, name) else f"{path}: " if in_file else ""
        raise UserError(f"{where}{error}") from None


# Settings that are fixed once a run's model and data are staged: other values would be ignored.
# The exceptions take effect at every start; a checkpoint records the values it was made with.
_STAGED = ("model.", "data.")
_COUNTS_ANEW = (
    "model.gradient_checkpointing",
    "data.sequence_length",
    "data.max_length",
    "data.validation_fraction",
)


def _check_unchanged(
    options: list[str], *, values_of_file: dict[str, Any], parsed: Namespace, hints: dict[str, Any]
) -> None:
    for name in hints:
        if name.startswith(_STAGED) and name not in _COUNTS_ANEW and gives(options, name):
            before: Any = values_of_file
            for key in name.split("."):
                before = before.get(key) if isinstance(before, dict) else None
            now = parsed[name]
            if (list(now) if isinstance(now, tuple) else now) != before:
                raise UserError(
                    f"--{name}: cannot change during a run, which started with {before}; leave "
                    "it out, or start a new run"
                )


def to_yaml(config: Any) -> str:
    """Return the settings of `config` (a dataclass) as YAML that `parse` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _parser(config_class: Any, prog: str, *, with_help: bool) -> ArgumentParser:
    """Return a parser with an argument for every setting, in groups as the dataclasses nest.

    Not `add_class_arguments`: to resolve hints it runs a module's `if TYPE_CHECKING:` imports,
    and so would load torch before it answers.
    """
    parser = ArgumentParser(
        prog=prog, description=config_class.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="a job file or a settings file")

    def add(target: Any, kind: Any, prefix: str) -> None:
        help_of = _field_docstrings(kind) if with_help else {}
        hints = typing.get_type_hints(kind)
        # Groups come after the settings that stand alone, as in --help.
        for field in sorted(dataclasses.fields(kind), key=lambda f: _is_group(hints[f.name])):
            name, hint = f"{prefix}{field.name}", hints[field.name]
            if _is_group(hint):
                add(parser.add_argument_group(name, hint.__doc__), hint, f"{name}.")
                continue
            # Written by the set-up, not by the user (`staged`): its keys are checked but not shown.
            hidden = _dataclass_in(hint) is not None
            text = argparse.SUPPRESS if hidden else help_of.get(field.name)
            plain = dict | None if hidden else hint
            target.add_argument(f"--{name}", type=plain, default=field.default, help=text)

    add(parser, config_class, "")
    return parser


def _field_docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the string under each field of a dataclass, its parents' fields included."""
    found = {}
    for parent in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


def _build(config_class: type[Config], values: Namespace | dict[str, Any]) -> Config:
    hints = typing.get_type_hints(config_class)
    arguments = {}
    for name, value in (values if isinstance(values, dict) else vars(values)).items():
        nested = _dataclass_in(hints[name])
        arguments[name] = _build(nested, value) if nested and value is not None else value
    return config_class(**arguments)


def _is_group(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass that a type hint names, alone or as `X | None`."""
    return next((option for option in _options_of(hint) if dataclasses.is_dataclass(option)), None)


def _options_of(hint: Any) -> tuple[Any, ...]:
    # Python 3.11 makes the older kind of union of `Literal["a"] | None`.
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _hints(config_class: Any, prefix: str = "") -> dict[str, Any]:
    """Return the dotted name and the type of every setting."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(config_class)
    for name, hint in (
        (field.name, hints[field.name]) for field in dataclasses.fields(config_class)
    ):
        found |= _hints(hint, f"{prefix}{name}.") if _is_group(hint) else {f"{prefix}{name}": hint}
    return found


def _with_switch_values(argv: list[str], hints: dict[str, Any]) -> list[str]:
    """Return `argv` with 'true' after a switch that stands alone (`--dry_run`)."""
    words = []
    for word, following in pairwise([*argv, "--"]):
        alone = hints.get(word.removeprefix("--")) is bool and following.startswith("-")
        words.append(f"{word}=true" if alone else word)
    return words


def _take_config_file(argv: list[str]) -> tuple[Path | None, list[str]]:
    rest, path = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, "")
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    if path == "":
        raise UserError("--config: give a file")
    return (Path(path) if path else None), rest


def gives(options: list[str], name: str) -> bool:
    """Return whether `name` is on the command line, be it with an empty value."""
    return any(word.partition("=")[0] == f"--{name}" for word in options)


def _read_settings(path: Path, config_class: Any) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: is not a mapping of settings, such as 'max_steps: 500'")
    # A job file also has script and resources, which do not concern the script.
    settings = loaded.get("arguments") or {} if "script" in loaded else loaded
    if not isinstance(settings, dict):
        raise UserError(f"{path}: 'arguments' is not a mapping, such as 'max_steps: 500'")
    return _check_keys(settings, config_class, path, "")


def _check_keys(
    settings: dict[str, Any], config_class: Any, path: Path, prefix: str
) -> dict[str, Any]:
    """Return `settings` without empty groups: a heading whose lines are all comments."""
    hints = typing.get_type_hints(config_class)
    checked = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if key not in hints:
            known = _hints(config_class, prefix)
            raise UserError(f"{path}: '{name}' is not a setting" + _nearest(name, known))
        nested = _dataclass_in(hints[key])
        if value is None and type(None) not in _options_of(hints[key]):
            if nested is None:
                raise UserError(f"{path}: {name}: is empty; give {_describe(hints[key])}")
            continue
        if nested is not None and value is not None:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {name}: is a group of settings, not '{value}'")
            value = _check_keys(value, nested, path, f"{name}.")
        checked[key] = value
    return checked


def _check_options(options: list[str], hints: dict[str, Any]) -> None:
    for word in options:
        match = re.match(r"--([\w.-]+)", word)
        if match and match[1] not in hints and match[1] != "help":
            raise UserError(f"--{match[1]} is not a setting" + _nearest(match[1], hints))


def _nearest(name: str, known: typing.Collection[str]) -> str:
    """Return the end of a message about an unknown name; `lr` alone finds `optimizer.lr`."""
    for ours in OURS.get(name, ()):
        if ours in known:
            return f"; here it is '{ours}'"
    by_last = {choice.rpartition(".")[2]: choice for choice in known}
    found = difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1, cutoff=0.7)
    if found:
        return f"; did you mean '{by_last[found[0]]}'?"
    return did_you_mean(name, known) or "; --help lists them"


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {type(None): "null", tuple[str, ...]: "a list of strings"}
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    options = [words.get(option, "settings") for option in _options_of(hint)]
    return " or ".join(options)


def _explain(message: str, where: str, hints: dict[str, Any]) -> str:
    """Return jsonargparse's message about one value as one line with the setting's name."""
    name = re.search(r'(?:Parser key "|argument --)([\w.]+)', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if name and value and name[1] in hints:
        return f"{where}{name[1]}: '{value[1]}' is not {_describe(hints[name[1]])}"
    if name and "expected one argument" in message:
        return f"--{name[1]}: give a value, {_describe(hints[name[1]])}"
    if message.startswith("unrecognized arguments: "):
        word = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        return f"'{word}' is not a setting; settings begin with --, as in --max_steps 500"
    return message
