"""A conversation with a language model: its turns, cut to the model's context, and its answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine.generation import Writer

Message = dict[str, str]


class Conversation:
    """What was said, and the model that answers."""

    def __init__(self, folder: Path, writer: Writer, max_new_tokens: int) -> None:
        """Begin one.

        Raises:
            UserError: the tokenizer has no chat template, or one that fails.
        """
        if not writer.tokenizer.chat_template:
            raise UserError(
                f"{folder}: its tokenizer has no chat template, so the model was not trained to "
                f"talk; if it was, put its template into {folder / 'chat_template.jinja'}, else "
                "use `make generate`"
            )
        self.system = ""
        self.turns: list[Message] = []
        """Of the user and the model, in turn."""
        self._writer, self._max_new_tokens = writer, max_new_tokens
        # Half of a short context is left to what was said.
        self._reserve = min(max_new_tokens, (writer.context or 2 * max_new_tokens) // 2)
        self.encode([_turn("user", "Hello")])

    def set_system(self, text: str) -> None:
        """Have `text` come before all turns; nothing, if it is empty.

        Raises:
            UserError: the template refuses it, or leaves it out.
        """
        before, self.system = self.system, ""
        turns = [_turn("user", "Hello")]
        without = self.encode(turns)
        self.system = text
        try:
            if text and self.encode(turns) == without:
                raise UserError("the chat template leaves out the system turn")
        except UserError:
            self.system = before
            raise

    def encode(self, turns: list[Message]) -> list[int]:
        """Return the tokens of the system turn and these, up to where the answer begins.

        Raises:
            UserError: the template refuses them.
        """
        first = [_turn("system", self.system)] if self.system else []
        try:
            # The template writes the special tokens, the one at the beginning too.
            ids: list[int] = self._writer.tokenizer.apply_chat_template(
                [*first, *turns], add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # whatever a template does
            raise UserError(f"the chat template refuses it: {error}") from None
        return ids

    def answer(self, text: str, show: Callable[[str], None]) -> None:
        """Add a turn of the user and the model's answer, whose pieces `show` gets at once.

        What was written before a KeyboardInterrupt is kept.

        Raises:
            UserError: the template refuses the turn, or it is longer than the context; it is not
                added.
        """
        turns = [*self.turns, _turn("user", text)]
        ids = self._fit(turns)
        if left_out := (len(self.turns) + 1 - len(turns)) // 2:
            which = "oldest turn does" if left_out == 1 else f"{left_out} oldest turns do"
            _note(f"the {which} not fit into the model's {self._writer.context} tokens any more")
        stream = Stream(self._writer, show)

        def keep() -> None:
            stream.end()
            self.turns = [*turns, _turn("assistant", stream.text)]

        try:
            written = self._writer.write(ids, stream)
        except KeyboardInterrupt:
            keep()
            raise
        keep()
        if written[-1] not in self._writer.end_ids:
            asked = len(written) == self._max_new_tokens
            limit = "--max_new_tokens" if asked else f"the model's context, {self._writer.context}"
            _note(f"the answer was cut off after {len(written)} tokens: {limit}")
        elif not stream.text:
            _note("the model ended its turn without a word")

    def _fit(self, turns: list[Message]) -> list[int]:
        """Take out the oldest turns, in pairs, until an answer fits; return the tokens."""
        context = self._writer.context
        while True:
            ids = self.encode(turns)
            if context is None or len(ids) + self._reserve <= context:
                return ids
            if len(turns) == 1:
                break
            del turns[:2]
        if len(ids) >= context:
            raise UserError(
                f"this turn takes {len(ids)} tokens, and the model has {context}; shorten it"
            )
        return ids


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


class Stream:
    """A streamer of transformers': hands on the text of tokens as soon as they are characters.

    Unlike its TextStreamer it does not wait for the end of a word, and keeps the space that a
    line begins with.
    """

    def __init__(self, writer: Writer, show: Callable[[str], None]) -> None:
        self.text = ""
        """All that was handed on."""
        self._writer, self._show = writer, show
        self._ids: list[int] | None = None

    def put(self, tokens: Any) -> None:
        """Take the prompt, which comes first, or the next token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += [token for token in tokens.tolist() if token not in self._writer.end_ids]
        text = self._decode()
        # A character of several tokens is not complete yet.
        if not text.endswith("\ufffd"):
            self._hand_on(text)

    def end(self) -> None:
        """Hand on what is left."""
        self._hand_on(self._decode())

    def _decode(self) -> str:
        text: str = self._writer.tokenizer.decode(
            self._ids or [], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _hand_on(self, text: str) -> None:
        new, self.text = text[len(self.text) :], text
        if new:
            self._show(new)
