"""Which tokens are learned, by hand, under templates as the model families have them.

One token is one character, and each special token, so that the marks can be read: what is between
⟦ and ⟧ is learned.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from runfolder.errors import UserError
from tests.fast.train.labs.chat.conftest import with_template
from tests.shared import CHECKOUT
from train.engine import tokenization, transformers_tokenizer
from train.labs.chat import template
from train.labs.chat.conversations import Conversation, Turn
from train.labs.chat.template import Template
from train.labs.chat.tokens import apart, mark_answers

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


def marked(folder: Path, turns: list[Turn], *, num_given: int = 0, learn: str = "answers") -> str:
    """Return the text of the tokens, with ⟦ and ⟧ around those that are learned."""
    tokenizer = tokenization.load(folder, parse_special_tokens=True)
    conversation = Conversation("row 1", turns, num_given)
    text, spans = Template(folder).write_with_answers(conversation, learn)
    encoding = tokenizer.tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    ids, offsets, _ = apart(text, spans, encoding, tokenizer)
    assert (ids, offsets) == (encoding.ids, encoding.offsets)
    answers, _ = mark_answers(spans, ids, offsets, text, tokenizer)
    told, before = "", None
    for (start, end), answer in zip(offsets, answers, strict=True):
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
    assert marked(folder, TURNS, learn="last_answer") == last
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
        writer.write_with_answers(Conversation("row 1", TURNS[1:]), "answers")


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
        writer.write_with_answers(Conversation("row 1", TURNS), "answers")


def test_tool_calls_that_the_template_does_not_write_are_refused(
    characters: Path, tmp_path: Path
) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    turns = [*TURNS[:1], called, *TURNS[2:]]
    writer = Template(with_template(characters, LLAMA_3, tmp_path / "ignores"))
    with pytest.raises(UserError, match=r"^row 1: turn 2: the chat template writes nothing of it"):
        writer.write_with_answers(Conversation("row 1", turns), "answers")
    body = LLAMA_3.replace(
        "m['content'] | trim", "(m.tool_calls | tojson if m.tool_calls else m['content'] | trim)"
    )
    assert '⟦[{"name": "f"}]<|eot|>⟧' in marked(with_template(characters, body, tmp_path), turns)


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_an_answer_that_begins_inside_a_token_is_split_as_the_model_is_asked(
    kind: str, tmp_path: Path
) -> None:
    # What asks ends with a space, which both kinds of tokenizer join to the next word.
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "words"))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = list("[]QA redblu\n▁")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["red red blue blue"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenization.write_config(tmp_path, bos="<s>", eos="</s>")
    (tmp_path / template.FILE).write_text(
        "{% for m in messages %}{{ ('[Q] ' if m['role'] == 'user' else '[A] ') + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
        "{{ '[A] ' if add_generation_prompt }}"
    )
    loaded = tokenization.load(tmp_path, parse_special_tokens=True)
    turns = [{"role": "user", "content": "blue"}, {"role": "assistant", "content": "red"}] * 2
    text, spans = Template(tmp_path).write_with_answers(Conversation("row 1", turns), "answers")
    encoding = loaded.tokenizer.encode(text, add_special_tokens=False)
    assert any(text[a:b] == " red" for a, b in encoding.offsets)
    ids, offsets, num_split = apart(text, spans, encoding, loaded)
    answers, _ = mark_answers(spans, ids, offsets, text, loaded)
    assert num_split == 2
    learned = [(text[a:b], i) for i, (a, b), n in zip(ids, offsets, answers, strict=True) if n == 0]
    assert learned == [
        ("red", loaded.tokenizer.token_to_id("red")),
        ("</s>", loaded.tokenizer.token_to_id("</s>")),
    ]
    asked = loaded.tokenizer.encode("[Q] blue[A] ", add_special_tokens=False).ids
    assert ids[: len(asked)] == asked
    together, split = (
        loaded.tokenizer.decode(some, skip_special_tokens=False) for some in (encoding.ids, ids)
    )
    assert together == split


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


# It says whether the template was written without torch, which takes seconds to import.
WRITE = """
import sys
from pathlib import Path
from train.labs.chat.template import Template

print(Template(Path(sys.argv[1])).write([{"role": "user", "content": "Hi"}], "row 1"))
sys.exit("torch" in sys.modules)
"""


def test_a_template_can_name_what_only_the_tokenizers_class_knows(tmp_path: Path) -> None:
    source, staged = tmp_path / "source", tmp_path / "staged"
    for folder in (source, staged):
        folder.mkdir()
    tokens = ["<unk>", "<s>", "</s>", *"\u2581Hi"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (source / template.FILE).write_text(
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token + unk_token }}"
    )
    transformers_tokenizer.place(source, staged)
    command = [sys.executable, "-c", WRITE, str(staged)]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    turns = [{"role": "user", "content": "Hi"}]
    expected = AutoTokenizer.from_pretrained(source).apply_chat_template(turns, tokenize=False)
    assert done.stdout == f"{expected}\n" == "<s>Hi</s><unk>\n"
