"""Chat: a line of standard input is a turn, and so is one typed at a terminal but for commands."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runfolder.errors import UserError
from tests.fast.train import chat_model
from train import chat
from train.conversation import Conversation

WORDS = ["--temperature", "0", "--max_new_tokens", "3"]


@pytest.fixture(scope="module")
def folder(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model.write(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def conversations(monkeypatch: pytest.MonkeyPatch) -> list[Conversation]:
    """Return the list of the conversations that begin."""
    begun: list[Conversation] = []
    begin = Conversation.__init__

    def noted(self: Conversation, *words: object) -> None:
        begin(self, *words)  # type: ignore[arg-type]
        begun.append(self)

    monkeypatch.setattr(Conversation, "__init__", noted)
    return begun


def of_user(conversation: Conversation) -> list[str]:
    return [turn["content"] for turn in conversation.turns if turn["role"] == "user"]


def give(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Put `data` into standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# ---- without a terminal ---------------------------------------------------------------------


def test_each_line_is_a_turn_and_only_answers_are_written(
    folder: Path,
    conversations: list[Conversation],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    give(monkeypatch, "Hi \n\n /reset\n/reset\ncaf\u00e9".encode())
    assert chat.main([str(folder), *WORDS]) == 0
    [conversation] = conversations
    assert of_user(conversation) == ["Hi ", " /reset", "/reset", "caf\u00e9"]
    output, errors = capfd.readouterr()
    answers = [turn["content"] for turn in conversation.turns if turn["role"] == "assistant"]
    assert output == "".join(f"{answer}\n" for answer in answers)
    assert {line.partition(":")[0] for line in errors.splitlines()} <= {"note"}


def test_a_line_that_is_refused_is_said_and_the_next_is_answered(
    folder: Path,
    conversations: list[Conversation],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    give(monkeypatch, b"forbidden\nHi\n")
    assert chat.main([str(folder), *WORDS]) == 2
    assert of_user(conversations[0]) == ["Hi"]
    errors = capsys.readouterr().err.splitlines()
    assert "error: the chat template refuses it: No such word" in errors


def test_input_that_is_not_text_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, b"\xff\n")
    with pytest.raises(UserError, match=r"^standard input: is not UTF-8 text"):
        chat.main([str(folder), *WORDS])


def test_the_same_seed_gives_the_same_conversation(
    folder: Path, conversations: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in ("1", "1", "2"):
        give(monkeypatch, b"Hi\nGo on\n")
        assert chat.main([str(folder), "--seed", seed, "--max_new_tokens", "9"]) == 0
    one, same, other = (conversation.turns for conversation in conversations)
    assert one == same != other


# ---- at a terminal --------------------------------------------------------------------------


@pytest.fixture
def typed(
    folder: Path,
    conversations: list[Conversation],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[Conversation, str]]:
    """Return a function that types lines; it returns the conversation and what is shown."""

    def type_lines(*lines: str | type[BaseException], words: list[str] = WORDS):
        coming = iter(lines)

        def read(prompt: str) -> str:
            line = next(coming, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        assert chat.main([str(folder), *words]) == 0
        shown = capsys.readouterr()
        return conversations[-1], shown.out + shown.err

    return type_lines


def test_reset_forgets_what_was_said_and_keeps_the_system_turn(typed: Callable) -> None:
    conversation, _ = typed(
        "Hi", "/reset", "You", "", "  ", words=[*WORDS, "--system", "Be brief."]
    )
    assert of_user(conversation) == ["You"]
    assert conversation.system == "Be brief."


def test_the_system_turn_is_set_shown_and_removed(typed: Callable) -> None:
    assert typed("Hi", "/system  Be brief. ")[0].system == "Be brief."
    conversation, shown = typed("/system", "/system Be brief.", "/system")
    assert conversation.system == ""
    assert shown.index("(there is no system turn)") < shown.index("(removed: Be brief.)")
    conversation, shown = typed("/system Be brief.", "/system forbidden", "Hi")
    assert conversation.system == "Be brief."
    assert shown.count("error: the chat template refuses it: No such word") == 1
    assert of_user(conversation) == ["Hi"]


def test_a_misspelt_command_is_not_said_to_the_model(typed: Callable) -> None:
    conversation, shown = typed("/rest", "/help", " /etc is a folder", "/exit", "Hi")
    assert "error: /rest is not a command; /help lists them\n" in shown
    assert shown.count("/reset ") == 1
    assert of_user(conversation) == [" /etc is a folder"]


def test_ctrl_c_at_the_prompt_ends_nothing(typed: Callable) -> None:
    conversation, shown = typed(KeyboardInterrupt, "Hi")
    assert "(Ctrl+D or /exit ends)" in shown
    assert of_user(conversation) == ["Hi"]


def test_text_that_is_not_utf8_is_not_said(typed: Callable) -> None:
    conversation, shown = typed("\udcff", "Hi")
    assert "error: this: is not UTF-8 text; check the terminal's encoding" in shown
    assert of_user(conversation) == ["Hi"]


def test_ctrl_c_during_an_answer_stops_the_answer(
    typed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, asked = Conversation.answer, []

    def interrupted(self: Conversation, text: str, show: Callable[[str], None]) -> None:
        asked.append(text)
        if len(asked) == 1:
            raise KeyboardInterrupt
        answer(self, text, show)

    monkeypatch.setattr(Conversation, "answer", interrupted)
    _, shown = typed("Hi", "Go on")
    assert asked == ["Hi", "Go on"]
    assert shown.count("(stopped)") == 1


# ---- wrong input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--max_new_tokens", "0"], "^--max_new_tokens: 0 is not positive$"),
        (["--sytem", "x"], "^--sytem is not a setting; did you mean 'system'?"),
        (["--system", "forbidden"], "^the chat template refuses it: No such word$"),
        (["--system", "\udcff"], "^--system: is not UTF-8 text"),
    ],
)
def test_a_wrong_word_is_one_line(folder: Path, words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        chat.main([str(folder), *words])


def test_a_model_without_a_template_is_one_line_and_one_beside_it_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = shutil.copytree(folder, tmp_path / "export")
    template = export / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    with pytest.raises(
        UserError, match=f"^{export}: its tokenizer has no chat template.*{template}"
    ):
        chat.main([str(tmp_path), *WORDS])
    template.write_text(text)
    give(monkeypatch, b"")
    assert chat.main([str(tmp_path), *WORDS]) == 0
