"""Conversations: rows of files or of a dataset, whatever their columns, as turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runfolder.errors import UserError
from train.engine.rows import as_text
from train.labs.chat.settings import ConversationSettings

# What the chat template reads: role, content, and whatever else a turn has.
Turn = dict[str, Any]

ROLES = {"system", "user", "assistant", "tool"}
_READ = {"role", "content", "weight"}
# The names of ShareGPT.
_SAME_AS = {"human": "user", "gpt": "assistant"}
# The columns of each form, in the order in which they are looked for, and those it may have.
_FORMS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("messages",), ()),
    (("conversations",), ("system",)),
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input", "system")),
]


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, and where it is."""

    where: str
    turns: list[Turn]
    num_given: int = 0
    """The turns at the beginning that are never learned: a prompt's, whatever their roles."""

    def learned(self, which: str) -> list[int]:
        """Return the numbers of the turns to learn, `which` being `data.learn`.

        As in OpenAI's format, a weight of 0 is that of a turn that is not learned.
        """
        found = [
            number
            for number, turn in enumerate(self.turns)
            if number >= self.num_given and turn["role"] == "assistant" and turn.get("weight") != 0
        ]
        return found[-1:] if which == "last_answer" else found


class Form:
    """Which columns hold the conversations of a source; chosen at the first row of each file."""

    def __init__(self, setting: str, settings: ConversationSettings) -> None:
        self.setting = setting
        self._column = settings.column
        self._leaves_out = settings.bad_rows == "leave_out"
        self._num_left_out = 0
        self._first_left_out = ""
        self.columns: list[str] = []
        """Of the file that is being read."""
        self._told: dict[str, None] = {}
        self._keys: dict[str, None] = {}

    def choose(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the columns to read of those with `names`, as `rows.Columns` does.

        Raises:
            UserError: they are of no known form.
        """
        if self._column is not None:
            self.columns = [self._column]
        else:
            forms = [form for form in _FORMS if set(form[0]) <= set(names)]
            if not forms:
                raise UserError(
                    f"{self.setting}: has the columns {', '.join(names)}, but neither messages, "
                    "conversations, prompt and completion, nor instruction and output; name the "
                    "one with the turns with --data.column"
                )
            required, optional = forms[0]
            self.columns = [*required, *(name for name in optional if name in names)]
        unread = ", ".join(name for name in names if name not in self.columns)
        line = f"columns {', '.join(self.columns)}" + (f"; not read: {unread}" if unread else "")
        self._told[line] = None
        return {"column": self.columns[0], **{name: name for name in self.columns[1:]}}

    def describe(self) -> str:
        """Return which columns were read, and which were not, of all files so far."""
        keys = ", ".join(self._keys)
        given = [f"the turns' {keys} are left to the chat template"] if keys else []
        if self._num_left_out:
            rows = "1 row is" if self._num_left_out == 1 else f"{self._num_left_out:,} rows are"
            given.append(f"{rows} left out, the first: {self._first_left_out}")
        return "; ".join([*self._told, *given])

    def leave_out(self, error: UserError) -> None:
        """Count a row that cannot be learned from, if such rows are left out.

        Raises:
            UserError: they are refused.
        """
        if not self._leaves_out:
            raise UserError(
                f"{error} (or leave out such rows: --data.bad_rows leave_out)"
            ) from None
        self._num_left_out += 1
        self._first_left_out = self._first_left_out or str(error)

    def conversation(self, where: str, values: Sequence[Any]) -> Conversation:
        """Return the conversation of a row with the chosen columns.

        Raises:
            UserError: it is not one with an answer to learn.
        """
        row = dict(zip(self.columns, values, strict=True))
        given = []
        if system := row.get("system"):
            given = [{"role": "system", "content": as_text(system, where, "system")}]
        if "instruction" in row:
            parts = (as_text(row.get(name), where, name) for name in ("instruction", "input"))
            prompt: Any = "\n\n".join(part for part in parts if part.strip())
            turns, num_given = _pair(where, prompt, row["output"], ("instruction", "output"))
        elif "prompt" in row and "completion" in row:
            pair = (row["prompt"], row["completion"])
            turns, num_given = _pair(where, *pair, ("prompt", "completion"))
        else:
            column = self.columns[0]
            turns, num_given = _turns(where, row[column], column), 0
        turns = given + turns
        self._keys |= {key: None for turn in turns for key in turn.keys() - _READ}
        num_given = num_given + len(given) if num_given else 0
        conversation = Conversation(where, turns, num_given)
        _check(conversation)
        return conversation


def _pair(where: str, prompt: Any, answer: Any, names: tuple[str, str]) -> tuple[list[Turn], int]:
    """Return the turns of a question and its answer, each a text or turns, and of the question."""
    if isinstance(prompt, list) and isinstance(answer, list):
        asked = _turns(where, prompt, names[0])
        return asked + _turns(where, answer, names[1]), len(asked)
    turns = []
    for role, value, name in zip(("user", "assistant"), (prompt, answer), names, strict=True):
        text = as_text(value, where, name)
        if not text.strip():
            raise UserError(f"{where}: '{name}' is empty; remove the row, or fill it in")
        turns.append({"role": role, "content": text})
    return turns, 1


def _turns(where: str, value: Any, column: str) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        kind = type(value).__name__
        raise UserError(
            f"{where}: '{column}' is not a list of turns such as "
            f'[{{"role": "user", "content": "..."}}] but {kind}'
        )
    return [_turn(f"{where}: turn {number}", turn) for number, turn in enumerate(value, start=1)]


def _turn(where: str, turn: Turn) -> Turn:
    names = ("role", "content") if "role" in turn else ("from", "value")
    for name in names:
        if name not in turn:
            raise UserError(f"{where}: has no '{name}', only {', '.join(map(str, turn))}")
    role, content = (turn[name] for name in names)
    role = _SAME_AS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UserError(
            f"{where}: its role is {role!r}; it has to be one of system, user, assistant, tool "
            "(or human, gpt)"
        )
    # A table has every key in every row.
    others = {key: kept for key, kept in turn.items() if key not in names and kept is not None}
    if others.get("weight", 1) not in (0, 1):
        raise UserError(f"{where}: its weight is {others['weight']!r}; it has to be 0 or 1")
    text = as_text(_joined(content, where), where, names[1])
    if not text.strip() and not others.get("tool_calls"):
        raise UserError(f"{where}: its {names[1]} is empty; remove it, or the whole row")
    return {"role": role, "content": text, **others}


def _joined(content: Any, where: str) -> Any:
    """Return the text of a turn's parts, as OpenAI's format has them; other content as it is."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {} for part in content]
    if other := next((part for part in parts if part.get("type") != "text"), None):
        raise UserError(f"{where}: has a part of type {other.get('type')!r}; only text is learned")
    return "".join(as_text(part.get("text"), where, "text") for part in parts)


def _check(conversation: Conversation) -> None:
    where, roles = conversation.where, [turn["role"] for turn in conversation.turns]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise UserError(
            f"{where}: turn {number} is the system's, which may only be the first; move it there"
        )
    if not conversation.learned("answers"):
        raise UserError(f"{where}: has no turn of the assistant to learn; remove the row")
