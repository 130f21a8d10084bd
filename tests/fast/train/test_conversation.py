"""A conversation: which tokens the model is fed, where an answer ends, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runfolder.errors import UserError
from tests.fast.train import chat_model
from tests.fast.train.chat_model import BOS, CONTEXT, END_OF_TURN, EOS, Spoken
from train.conversation import Conversation
from train.engine.generation import Sampling, Writer

MAX_NEW_TOKENS = 20


@pytest.fixture(scope="module")
def folder(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model.write(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def writer(folder: Path) -> Writer:
    return Writer(folder, Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS))


@pytest.fixture
def conversation(folder: Path, writer: Writer) -> Conversation:
    return Conversation(folder, writer, MAX_NEW_TOKENS)


@pytest.fixture
def model(conversation: Conversation, writer: Writer) -> Spoken:
    return Spoken(writer)


def tokens(writer: Writer, text: str) -> list[int]:
    """The tokens of a text, in which only what the text spells is special."""
    ids: list[int] = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def ask(conversation: Conversation, text: str) -> list[str]:
    pieces: list[str] = []
    conversation.answer(text, pieces.append)
    return pieces


def test_two_turns_are_fed_as_the_template_writes_them_with_one_bos(
    conversation: Conversation, writer: Writer, model: Spoken
) -> None:
    assert writer.tokenizer("x")["input_ids"][0] == BOS, "else none could be doubled"
    for answer in ("It is.", "Yes"):
        model.say([*tokens(writer, answer), EOS])
        ask(conversation, f"before {answer}")
    first = "<s>u:before It is.\na:"
    second = f"{first}It is.</s>\nu:before Yes\na:"
    assert model.fed == [tokens(writer, first), tokens(writer, second)]
    assert [ids.count(BOS) for ids in model.fed] == [1, 1]
    roles = [turn["role"] for turn in conversation.turns]
    assert roles == ["user", "assistant"] * 2
    assert conversation.turns[3]["content"] == "Yes"


@pytest.mark.parametrize("end", [EOS, END_OF_TURN], ids=["tokenizer", "generation_config"])
def test_an_answer_ends_at_each_end_of_a_turn_which_is_not_shown(
    conversation: Conversation,
    writer: Writer,
    model: Spoken,
    end: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.say([*tokens(writer, "Well, so"), end, *tokens(writer, " it goes on")])
    assert "".join(ask(conversation, "Hi")) == "Well, so"
    assert capsys.readouterr().err == ""
    model.say([end])
    assert ask(conversation, "Hi") == []
    assert capsys.readouterr().err == "note: the model ended its turn without a word\n"


def test_a_character_of_several_tokens_comes_as_a_whole_and_a_line_keeps_its_space(
    conversation: Conversation, writer: Writer, model: Spoken
) -> None:
    answer = "\u6d77:\n  x"
    assert len(tokens(writer, "\u6d77")) == 3
    model.say([*tokens(writer, answer), EOS])
    pieces = ask(conversation, "Hi")
    assert "".join(pieces) == answer
    assert pieces[0] == "\u6d77"
    # One that is never completed is still said.
    model.say([tokens(writer, "\u6d77")[0], EOS])
    assert ask(conversation, "Hi") == ["\ufffd"]


def test_what_was_said_before_ctrl_c_is_kept_and_the_conversation_goes_on(
    conversation: Conversation, writer: Writer, model: Spoken
) -> None:
    shown: list[str] = []

    def interrupt(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    model.say(tokens(writer, "one, two, three, four"))
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Count", interrupt)
    said = "".join(shown)
    assert "one, two, three, four".startswith(said)
    model.say([EOS])
    ask(conversation, "Go on")
    assert model.fed[1] == tokens(writer, f"<s>u:Count\na:{said}</s>\nu:Go on\na:")


def test_the_oldest_turns_are_left_out_and_the_system_turn_is_not(
    conversation: Conversation,
    writer: Writer,
    model: Spoken,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversation.set_system("Be brief.")
    questions = [f"Question number {n}?" for n in range(1, 6)]
    for question in questions:
        model.say([*tokens(writer, "Yes"), EOS])
        ask(conversation, question)

    def prompt(first: int, last: int) -> list[int]:
        turns = "</s>\n".join(f"u:{question}\na:Yes" for question in questions[first:last])
        return tokens(writer, f"<s>s:Be brief.\n{turns}"[: -len("Yes")])

    # The first of those that leave room for an answer.
    for last, fed in enumerate(model.fed, start=1):
        firsts = range(last)
        fits = [f for f in firsts if len(prompt(f, last)) + MAX_NEW_TOKENS <= CONTEXT]
        assert fed == prompt(fits[0], last)
    left_out = len(questions) - sum(turn["role"] == "user" for turn in conversation.turns)
    assert left_out == fits[0] > 0
    notes = capsys.readouterr().err.splitlines()
    line = f"note: the oldest turn does not fit into the model's {CONTEXT} tokens any more"
    assert notes == [line] * left_out


def test_a_turn_that_the_context_cannot_hold_is_refused_and_not_kept(
    conversation: Conversation, writer: Writer, model: Spoken, capsys: pytest.CaptureFixture[str]
) -> None:
    model.say([EOS])
    ask(conversation, "Hi")
    before = list(conversation.turns)
    with pytest.raises(UserError, match=rf"takes \d+ tokens, and the model has {CONTEXT}; shorten"):
        ask(conversation, "x y " * CONTEXT)
    assert conversation.turns == before
    capsys.readouterr()
    # One that fits alone, with little room.
    text = "x"
    while len(tokens(writer, f"<s>u:{text} z\na:")) <= CONTEXT - 3:
        text += " z"
    room = CONTEXT - len(tokens(writer, f"<s>u:{text}\na:"))
    model.say(tokens(writer, "no end in sight at all"))
    ask(conversation, text)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("note: the oldest turn does not fit")
    assert second == (
        f"note: the answer was cut off after {room} tokens: the model's context, {CONTEXT}"
    )


def test_an_answer_that_reaches_its_limit_says_so(
    conversation: Conversation, writer: Writer, model: Spoken, capsys: pytest.CaptureFixture[str]
) -> None:
    model.say(tokens(writer, "a") * (MAX_NEW_TOKENS + 1))
    assert "".join(ask(conversation, "Hi")) == "a" * MAX_NEW_TOKENS
    line = f"note: the answer was cut off after {MAX_NEW_TOKENS} tokens: --max_new_tokens\n"
    assert capsys.readouterr().err == line


# ---- templates ------------------------------------------------------------------------------


def test_a_turn_that_the_template_refuses_is_left_out(
    conversation: Conversation, writer: Writer, model: Spoken
) -> None:
    with pytest.raises(UserError, match=r"^the chat template refuses it: No such word$"):
        ask(conversation, "a forbidden word")
    model.say([EOS])
    ask(conversation, "Hi")
    assert model.fed == [tokens(writer, "<s>u:Hi\na:")]


def test_a_system_turn_that_the_template_refuses_leaves_the_one_before(
    conversation: Conversation,
) -> None:
    conversation.set_system("Be brief.")
    with pytest.raises(UserError, match="No such word"):
        conversation.set_system("forbidden")
    assert conversation.system == "Be brief."
    conversation.set_system("")
    assert conversation.system == ""


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, r"has no chat template.*put its template into .*/chat_template\.jinja, else use"),
        ("{{ raise_exception('not today') }}", "the chat template refuses it: not today"),
        ("{% if %}", "the chat template refuses it: "),
    ],
)
def test_a_conversation_needs_a_template_that_works(
    folder: Path, writer: Writer, template: Any, line: str
) -> None:
    writer.tokenizer.chat_template = template
    with pytest.raises(UserError, match=line):
        Conversation(folder, writer, MAX_NEW_TOKENS)


def test_a_template_that_leaves_out_the_system_turn_is_found_out(
    folder: Path, writer: Writer
) -> None:
    writer.tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(UserError, match=r"^the chat template leaves out the system turn$"):
        Conversation(folder, writer, MAX_NEW_TOKENS).set_system("Be brief.")
