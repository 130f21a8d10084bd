"""Which tokens are learned, by hand, under templates as the model families have them.

One token is one character, and each special token, so that the marks can be read: what is between
⟦ and ⟧ is learned.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from runfolder.errors import UserError
from tests.fast.train.labs.chat.conftest import with_template
from train.engine import tokenization
from train.labs.chat import template
from train.labs.chat.conversations import Conversation, Turn
from train.labs.chat.examples import mark_answers
from train.labs.chat.template import Template

# In the manner of Llama 3: a header for each turn, trimmed texts, an end token.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' + m['role'] + '<|body|>\\n\\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\\n\\n' }}{% endif %}"
)
# In the manner of Llama 2 and Mistral: roles alternate, nothing asks for an answer but the [/INST].
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# In the manner of Qwen 3: an empty thought before the last answer only; earlier ones are dropped.
QWEN_3 = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages if m['role'] == 'user' %}{% set last.user = loop.index * 2 - 2 %}"
    "{% endfor %}"
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.index0 > last.user %}"
    "{{ '<think>' + parts[0].replace('<think>', '') if parts | length > 1 else '<think>' }}"
    "{{ '</think>' }}{% endif %}{{ parts[-1].lstrip('\\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|eot|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\\n' }}{% endif %}"
)
# Nothing ends an answer but the next line.
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"

TURNS: list[Turn] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Ho "},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So.\n"},
]
THOUGHT: list[Turn] = [
    *TURNS[:3],
    {"role": "assistant", "content": "<think>hm</think>\n\nSo."},
]
EXPECTED = {
    "default": (
        template.DEFAULT,
        TURNS,
        "<s><|user|>\nHi</s>\n<|assistant|>\n⟦ Ho </s>⟧\n"
        "<|user|>\nWhy?</s>\n<|assistant|>\n⟦So.\n</s>⟧\n",
    ),
    "chatml": (
        template.CHATML,
        TURNS,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦ Ho <|im_end|>⟧\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦So.\n<|im_end|>⟧\n",
    ),
    "llama 3": (
        LLAMA_3,
        TURNS,
        "<s><|head|>user<|body|>\n\nHi<|eot|><|head|>assistant<|body|>\n\n⟦Ho<|eot|>⟧"
        "<|head|>user<|body|>\n\nWhy?<|eot|><|head|>assistant<|body|>\n\n⟦So.<|eot|>⟧",
    ),
    "mistral": (
        MISTRAL,
        TURNS,
        "<s>[INST] Hi [/INST]⟦  Ho </s>⟧[INST] Why? [/INST]⟦ So.\n</s>⟧",
    ),
    "qwen 3": (
        QWEN_3,
        TURNS,
        "<|head|>user\nHi<|eot|>\n<|head|>assistant\n⟦ Ho <|eot|>⟧\n"
        "<|head|>user\nWhy?<|eot|>\n<|head|>assistant\n⟦<think></think>So.\n<|eot|>⟧\n",
    ),
    "qwen 3 with a thought": (
        QWEN_3,
        THOUGHT,
        "<|head|>user\nHi<|eot|>\n<|head|>assistant\n⟦ Ho <|eot|>⟧\n"
        "<|head|>user\nWhy?<|eot|>\n<|head|>assistant\n⟦<think>hm</think>So.<|eot|>⟧\n",
    ),
    "plain": (PLAIN, TURNS, "user: Hi\n⟦assistant:  Ho ⟧\nuser: Why?\n⟦assistant: So.\n⟧\n"),
}


def marked(folder: Path, turns: list[Turn], *, num_given: int = 0, last_only: bool = False) -> str:
    """Return the text of the tokens, with ⟦ and ⟧ around those that are learned."""
    tokenizer = tokenization.load(folder, parse_special_tokens=True)
    conversation = Conversation("row 1", turns, num_given)
    text, spans = Template(folder).write_with_answers(conversation, last_only=last_only)
    encoding = tokenizer.tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    answers, _ = mark_answers(spans, encoding.ids, encoding.offsets, text, tokenizer)
    told, before = "", None
    for (start, end), answer in zip(encoding.offsets, answers, strict=True):
        if answer != before:
            told += ("⟧" if before is not None else "") + ("⟦" if answer is not None else "")
        told += text[start:end]
        before = answer
    return told + ("⟧" if before is not None else "")


@pytest.mark.parametrize(("body", "turns", "expected"), EXPECTED.values(), ids=EXPECTED.keys())
def test_the_answers_and_their_end_tokens_are_learned(
    body: str, turns: list[Turn], expected: str, characters: Path, tmp_path: Path
) -> None:
    assert marked(with_template(characters, body, tmp_path), turns) == expected


def test_only_the_last_answer_or_only_what_is_not_given(characters: Path, tmp_path: Path) -> None:
    folder = with_template(characters, LLAMA_3, tmp_path)
    last = (
        "<s><|head|>user<|body|>\n\nHi<|eot|><|head|>assistant<|body|>\n\nHo<|eot|>"
        "<|head|>user<|body|>\n\nWhy?<|eot|><|head|>assistant<|body|>\n\n⟦So.<|eot|>⟧"
    )
    assert marked(folder, TURNS, last_only=True) == last
    assert marked(folder, TURNS, num_given=3) == last


def test_an_answer_that_is_also_asked_is_found_where_it_is_answered(
    characters: Path, tmp_path: Path
) -> None:
    folder = with_template(characters, MISTRAL, tmp_path)
    turns = [{"role": "user", "content": "Say So."}, {"role": "assistant", "content": "So."}]
    assert marked(folder, [*turns, *turns]) == (
        "<s>[INST] Say So. [/INST]⟦ So.</s>⟧[INST] Say So. [/INST]⟦ So.</s>⟧"
    )


def test_what_the_template_refuses_is_said_in_its_words(characters: Path, tmp_path: Path) -> None:
    writer = Template(with_template(characters, MISTRAL, tmp_path))
    with pytest.raises(
        UserError, match=r"^row 1: the chat template does not take it: roles must alternate$"
    ):
        writer.write_with_answers(Conversation("row 1", TURNS[1:]), last_only=False)


@pytest.mark.parametrize(
    "body",
    [
        "{% for m in messages %}{{ m['content'] | upper | replace('\ue000', '') }}{% endfor %}",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
    ],
    ids=["rewritten", "left out"],
)
def test_an_answer_that_is_not_in_the_text_is_refused(
    body: str, characters: Path, tmp_path: Path
) -> None:
    writer = Template(with_template(characters, body, tmp_path))
    with pytest.raises(UserError, match=r"use another --data.chat_template"):
        writer.write_with_answers(Conversation("row 1", TURNS), last_only=False)


def test_a_template_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.chat_template: .*none.jinja cannot be read"):
        template.read(str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match=r"cannot be read .Is a directory.; give a .jinja file"):
        template.read(str(tmp_path))


def test_added_tokens_are_special_and_the_last(characters: Path, tmp_path: Path) -> None:
    before = tokenization.load(characters).vocab_size
    folder = with_template(characters, template.CHATML, tmp_path)
    tokenizer = tokenization.load(folder, parse_special_tokens=True)
    assert tokenizer.vocab_size == before + 2
    ids = tokenizer.tokenizer.encode("a<|im_end|>", add_special_tokens=False).ids
    assert len(ids) == 2 and ids[1] == before + 1 and ids[1] in tokenizer.special_ids
