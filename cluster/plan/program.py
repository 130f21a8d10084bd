"""What a job runs when it is not a script of ours: somebody's script, a module, a command."""

from __future__ import annotations

import ast
import json
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from runfolder.errors import UserError

# The module of ours that runs it.
MODULE = "train.program"
Signal = Literal["USR1", "TERM", "none"]
DRY_RUN_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Program:
    """What runs, and what it is promised; docs/your-script.md."""

    kind: Literal["script", "module", "command"]
    name: str
    """A path in the run's code, a module, or a console command of a package."""
    arguments: list[str] = field(default_factory=list)
    resume_arguments: list[str] = field(default_factory=list)
    """Added to them from the second attempt on."""
    dry_run_arguments: list[str] = field(default_factory=list)
    """Added to them in a dry run."""
    checkpoints: str = "checkpoints"
    """What it writes when it saves, seen from the run's folder."""
    signal: Signal = "USR1"
    """What asks it to save before the time limit. At preemption TERM comes, unless it is none."""
    independent_ranks: bool = False
    """Whether its ranks train models of their own on purpose."""

    def record(self) -> dict[str, Any]:
        """Return what run.json says of it."""
        return asdict(self)

    def check_copied(self, code: Path | Container[str], settings: Path) -> None:
        """Raise `UserError` if a script is not among its folder's code; `settings` names it."""
        if self.kind != "script":
            return
        is_there = (code / self.name).is_file() if isinstance(code, Path) else self.name in code
        if not is_there:
            raise UserError(
                f"{settings}: script: {self.name} was not copied to the run: git ignores it, or it "
                "is over 1 MB; commit it, or move it"
            )

    def config(self, words: list[str], *, dry_run: bool) -> str:
        """Return the config.yaml of a run: JSON, which is YAML, for train/program.py."""
        more = self.dry_run_arguments if dry_run else []
        content = {
            "program": {"kind": self.kind, "name": self.name},
            "arguments": [*self.arguments, *more, *words],
            "resume_arguments": self.resume_arguments,
            "independent_ranks": self.independent_ranks,
            "dry_run": dry_run,
            "dry_run_steps": DRY_RUN_STEPS,
        }
        return json.dumps(content, indent=2) + "\n"


def exports_script(path: Path, where: str) -> bool:
    """Return whether a Python file says SCRIPT = ..., as ours do; nothing of it is run.

    Raises:
        UserError: it is not Python.
    """
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise UserError(
            f"{path}:{error.lineno}: is not Python: {error.msg}; {where} names it"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; {where} names it") from None
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return any(isinstance(t, ast.Name) and t.id == "SCRIPT" for n in assigned for t in n.targets)


def words_of(content: Any, where: str) -> list[str]:
    """Return the words of a command line: of a list as they are, of a mapping as --key value.

    Raises:
        UserError: it is neither.
    """
    if content is None:
        return []
    if isinstance(content, list):
        return [_word(entry, where) for entry in content]
    if not isinstance(content, dict):
        raise UserError(f"{where}: {content!r} is neither a list of words nor a mapping")
    words: list[str] = []
    for key, value in _flat(content):
        words.append(f"--{key}")
        values = value if isinstance(value, list) else [] if value is None else [value]
        words += [_word(entry, f"{where}.{key}") for entry in values]
    return words


def _flat(content: dict[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return pairs


def _word(entry: Any, where: str) -> str:
    if isinstance(entry, bool):
        return "true" if entry else "false"
    if isinstance(entry, str | int | float):
        return str(entry)
    raise UserError(f"{where}: {entry!r} is not a word; write it in quotes")
