"""The chat template: how a conversation is written as text, and where in it the answers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runfolder.errors import UserError
from train.engine import tokenization
from train.engine.modelfolder import read_json
from train.labs.chat.conversations import Conversation, Turn

FILE = "chat_template.jinja"
# The form of TinyLlama's and Zephyr's chat models: it needs no token that a tokenizer may lack.
_TURNS = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' }}
{% endif %}
"""
DEFAULT = _TURNS.replace("\n", "")
# The form of Qwen's chat models, and the tokens that it needs.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def has_template(folder: Path) -> bool:
    """Return whether the tokenizer in `folder` has a chat template."""
    config = read_json(folder / "tokenizer_config.json", "model.tokenizer") or {}
    return (folder / FILE).exists() or bool(config.get("chat_template"))


def read(given: str | None) -> tuple[str, list[str]]:
    """Return the template that `data.chat_template` names, and the tokens that it needs.

    Raises:
        UserError: it is no such file.
    """
    if given is None:
        return DEFAULT, []
    if given == "chatml":
        return CHATML, list(CHATML_TOKENS)
    try:
        return Path(given).expanduser().read_text(encoding="utf-8"), []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"data.chat_template: {given} cannot be read ({reason}); give a .jinja file, or chatml"
        ) from None


def place(source: Path, template: str, added: list[str], folder: Path) -> None:
    """Write the tokenizer of `source` with another template to `folder`, and tokens that it lacks.

    Raises:
        UserError: the template needs an end token, and the tokenizer has none.
    """
    tokenization.copy(source, folder)
    (folder / tokenization.FRAME).write_bytes((source / tokenization.FRAME).read_bytes())
    loaded = tokenization.load(folder)
    if template == DEFAULT:
        if loaded.eos_id is None:
            raise UserError(
                f"data.chat_template: the tokenizer {source} has no end token, which the default "
                "template writes after each turn; give a template of your own"
            )
        template = ("{{ bos_token }}" if loaded.starts else "") + template
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = read_json(folder / "tokenizer_config.json", "model.tokenizer") or {}
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / FILE).write_text(template, encoding="utf-8")


class Template:
    """The chat template of a staged tokenizer."""

    def __init__(self, folder: Path) -> None:
        # Slow to import, and needed only while conversations are staged. AutoTokenizer would bring
        # torch; what its classes add to the files, a template can name, and so the frame has it.
        from transformers import PreTrainedTokenizerFast
        from transformers.utils.logging import set_verbosity_error

        # It says that the class is another.
        set_verbosity_error()
        frame = read_json(folder / tokenization.FRAME, "model.tokenizer") or {}
        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
            folder, **frame.get("named", {})
        )

    def write(self, turns: list[Turn], where: str, *, ask: bool = False) -> str:
        """Return the turns as text; `ask` adds what comes before the assistant's next turn.

        Raises:
            UserError: the template does not take them.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template raises what it likes
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{where}: the chat template does not take it: {lines[0]}") from None
        return text

    def write_with_answers(
        self, conversation: Conversation, learn: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and the characters of each answer to learn: [start, end).

        `learn` is `data.learn`.

        An answer begins where the text ends that asks for it (`add_generation_prompt`), because
        that is what the model continues, and ends where the turn's own text does.

        Raises:
            UserError: the template does not take it, or writes a turn otherwise than its text.
        """
        turns, where = conversation.turns, conversation.where
        text = self.write(turns, where)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = self._spans(turns, answers, text, where)
        if len(spans) < len(answers):
            raise UserError(
                f"{where}: the chat template rewrites an answer, and where it is in the text "
                "cannot be found; use another --data.chat_template"
            )
        found = dict(zip(answers, spans, strict=True))
        for turn, (start, end) in found.items():
            if start == end:
                raise UserError(
                    f"{where}: turn {turn + 1}: the chat template writes nothing of it (of its "
                    "tool_calls, perhaps); use another --data.chat_template, or remove the row"
                )
        return text, [found[turn] for turn in conversation.learned(learn)]

    def _spans(
        self, turns: list[Turn], answers: list[int], text: str, where: str
    ) -> list[tuple[int, int]]:
        """Return the characters of each of the turns `answers`, as far as they can be found."""
        # Marks in place of the answers show what is around them.
        marks = [f"\ue000{number}\ue001" for number in range(len(answers))]
        marked = list(turns)
        for turn, mark in zip(answers, marks, strict=True):
            marked[turn] = {"role": "assistant", "content": mark}
        around = _split(self.write(marked, where), marks)
        asked = [self._asked(turns[:turn]) for turn in answers]
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(answers if around else []):
            before, after = around[number : number + 2]
            last_end = spans[-1][1] if spans else 0
            # Where its own text begins, and ends, if the template writes it as it is or trimmed.
            inner = last_end + len(before) if text.startswith(before, last_end) else None
            end = None if inner is None else _end_of(text, turns[turn]["content"], inner, after)
            question = asked[number]
            start = len(question) if question and text.startswith(question) else inner
            if end is None and turn == answers[-1]:
                end = len(text) - len(after) if text.endswith(after) else None
            elif end is None:
                # What is before the next answer may depend on it, but not what asks for it.
                question = asked[number + 1]
                known = self._asked(marked[: answers[number + 1]])
                after = known.rpartition(marks[number])[2] if known else after
                if question and text.startswith(question) and question.endswith(after):
                    end = len(question) - len(after)
            if start is None or end is None or end < start:
                break
            spans.append((start, end))
        return spans

    def _asked(self, turns: list[Turn]) -> str | None:
        """Return the text that asks for the answer to `turns`, or None if there is none."""
        try:
            return self.write(turns, "", ask=True)
        except UserError:
            return None


def _split(text: str, marks: list[str]) -> list[str]:
    """Return the parts of `text` before, between and after the marks; none if one is not there."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            return []
        parts.append(part)
    return [*parts, text]


def _end_of(text: str, content: str, start: int, after: str) -> int | None:
    """Return where `content`, as it is or trimmed, ends at the text `after` it; None if nowhere."""
    for written in (content, content.strip(), content.lstrip(), content.rstrip()):
        end = start + len(written)
        if text.startswith(written, start) and text.startswith(after, end):
            return end
    return None
