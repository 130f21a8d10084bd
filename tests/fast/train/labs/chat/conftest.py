"""A tokenizer whose tokens are characters, with any chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from train.engine import staging, tokenization
from train.labs.chat import template


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the staged folder of a tokenizer whose tokens are bytes and a few special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|head|>", "<|body|>", "<|eot|>"])
    folder = tmp_path_factory.mktemp("characters")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenization.write_config(folder, bos="<s>", eos="</s>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLUICE_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        return staging.place_tokenizer(folder, "characters")


def with_template(characters: Path, body: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    added = template.CHATML_TOKENS if body == template.CHATML else ()
    template.place(characters, body, list(added), folder)
    return folder
