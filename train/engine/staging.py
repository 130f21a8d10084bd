"""The inputs of a run, staged once: model, tokenizer, packed text, in one datasets folder.

Each has a name derived from what it was made of, so that it is found again, and appears there by a
rename, so that nobody ever reads half of it.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine import (
    batches,
    hub,
    modelfolder,
    pooling,
    texts,
    tokenization,
    transformers_tokenizer,
)
from train.engine.config import StagedPaths, TextConfig, TrainingConfig
from train.engine.errors import said_of_the_disk
from train.engine.once import (
    datasets_folder,
    make_once,
    named_by_content,
    relative_to_datasets,
    staged_path,
)
from train.engine.presets import PRESETS
from train.engine.pretrained import ENCODER, LANGUAGE_MODEL
from train.engine.shape import read_shape

# Marks the folder of a hub encoder for which pooling files were requested and there are none.
FETCHED = "fetched"
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *pooling.FILES,
)


def stage(config: TextConfig, *, online: bool) -> StagedPaths:
    """Stage model, tokenizer and packed text, unless they are there already, and return the paths.

    Paths in `config.staged` are used as they are if they exist: a run continues with the text
    that it started with.

    Raises:
        UserError: something does not exist, is not what it should be, or is too short; or it
            would have to be downloaded and `online` is False.
    """
    with said_of_the_disk():
        staged, sources = config.staged, None
        if staged is None or not are_there(staged):
            sources = texts.find(config)
            staged = _stage(config, sources, online)
        _check_lengths(config, staged)
        if sources:
            _say_what_was_read(sources, staged, online)
    return staged


def model_shape(config: TrainingConfig, model: Path | None) -> dict[str, Any]:
    """Return vocab_size, max_position_embeddings, ... of the preset or of the model's folder."""
    if config.model.preset:
        return vars(PRESETS[config.model.preset])
    assert model is not None
    return read_shape(model, LANGUAGE_MODEL)


def sequence_length(config: TrainingConfig, model: Path | None) -> int:
    """Return the tokens of a block: as set, or the model's context up to 2048.

    Raises:
        UserError: the model's context is shorter.
    """
    context = model_shape(config, model)["max_position_embeddings"]
    length = config.data.sequence_length or min(context or 2048, 2048)
    if context and length > context:
        raise UserError(
            f"data.sequence_length: {length} is more than the {context} positions of the model; "
            f"try --data.sequence_length {context}"
        )
    return length


def are_there(staged: StagedPaths) -> bool:
    """Return whether all that was staged is still in the datasets folder."""
    names = (staged.model, staged.tokenizer, staged.train, staged.validation)
    return all(staged_path(name).exists() for name in names if name)


def stage_language_model(config: TrainingConfig, *, online: bool) -> Path | None:
    """Return the folder of the model to train, or None for a preset; as `stage_model`."""
    if config.model.preset is not None:
        return None
    return stage_model(
        config.model.name,
        config.model.revision,
        LANGUAGE_MODEL,
        online=online,
        tokenizer_source=config.model.tokenizer,
    )


def _stage(config: TextConfig, sources: dict[str, texts.Source], online: bool) -> StagedPaths:
    root = datasets_folder()
    model = stage_language_model(config, online=online)
    tokenizer_folder = stage_tokenizer(config, model, sources["train"], online=online)
    packed = {}
    for split, source in sources.items():
        folder = named_by_content(
            root / "packed",
            batches.FORMAT,
            tokenizer_folder.name,
            config.data.parse_special_tokens,
            source.made_of,
        )

        def make(unfinished: Path, source: texts.Source = source) -> None:
            loaded = tokenization.load(
                tokenizer_folder, parse_special_tokens=config.data.parse_special_tokens
            )
            _check_vocabulary(config, model_shape(config, model), loaded.text_vocab_size)
            batches.pack(source.read(), loaded, unfinished, source.name)

        packed[split] = make_once(folder, make, source.name, online=online or source.is_local)

    return StagedPaths(
        model=relative_to_datasets(model) if model else None,
        tokenizer=relative_to_datasets(tokenizer_folder),
        train=relative_to_datasets(packed["train"]),
        validation=relative_to_datasets(packed["validation"]),
    )


def _say_what_was_read(sources: dict[str, texts.Source], staged: StagedPaths, online: bool) -> None:
    for split, source in sources.items():
        if not texts.is_sample(source):
            packed = batches.Blocks(staged_path(getattr(staged, split)), 1).packed
            texts.say(source.describe(packed.describe()))
    texts.say_overlap(sources, online=online)


def _check_lengths(config: TextConfig, staged: StagedPaths) -> None:
    model = staged_path(staged.model) if staged.model else None
    shape = model_shape(config, model)
    length = sequence_length(config, model)
    blocks = batches.Blocks(staged_path(staged.train), length)
    _check_vocabulary(config, shape, blocks.packed.vocab_size)
    num_tokens = blocks.packed.num_tokens
    if blocks.num_full == 0:
        raise UserError(
            f"{texts.name_of(config, 'train')} has {num_tokens} tokens, but a block takes "
            f"{length + 1}; give more text or a smaller --data.sequence_length"
        )
    if batches.Blocks(staged_path(staged.validation), length).num_all == 0:
        raise UserError(
            f"{texts.name_of(config, 'validation')} has a single token, which leaves none to "
            "predict; give more text"
        )


def _check_vocabulary(config: TrainingConfig, shape: dict[str, Any], vocab_size: int) -> None:
    """Raise `UserError` if a model has no row for the ids below `vocab_size`."""
    # A preset's vocabulary grows with the tokenizer; weights that were trained do not.
    if config.model.preset or vocab_size <= (known := shape["vocab_size"]):
        return
    raise UserError(
        f"model.tokenizer: has ids up to {vocab_size - 1}, but the model {config.model.name} "
        f"has only {known} tokens; "
        + (
            "leave it out to use the model's own"
            if config.model.tokenizer
            else "remove the added tokens from its tokenizer files, or resize its embedding"
        )
    )


def stage_model(
    name: str,
    revision: str | None,
    kind: str,
    *,
    online: bool,
    tokenizer_source: str | None = None,
) -> Path:
    """Return the folder of a model of a `kind`: a folder as it is, a hub id downloaded once.

    `tokenizer_source` is where its tokenizer is, if not there.

    Raises:
        UserError: it is neither, or not a whole model of this kind with a tokenizer; or it would
            have to be downloaded and `online` is False.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return _checked(local.absolute(), kind, tokenizer_source)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"model.name: {name} is neither a folder nor a hub id such as owner/name")
    stem = f"{name}@{revision[:12] if revision else 'main'}".replace("/", "--")

    def download(unfinished: Path) -> None:
        hub.download_model(name, revision, unfinished, [*MODEL_FILES, *tokenization.FILES])
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)
        modelfolder.check_whole(unfinished)

    folder = datasets_folder() / "models" / stem
    make_once(folder, download, f"model.name: {name}", online=online, goes_on=True)
    if kind == ENCODER and not any((folder / file).exists() for file in (FETCHED, pooling.MODULES)):
        # Fetched by a version that did not fetch the pooling files.
        if not online:
            raise UserError(
                f"model.name: {folder} was fetched without its pooling files; "
                "run `make fetch` where there is a network"
            )
        hub.download_model(name, revision, folder, list(pooling.FILES))
        (folder / FETCHED).touch()
    return _checked(folder, kind, tokenizer_source)


def _checked(folder: Path, kind: str, tokenizer_source: str | None) -> Path:
    modelfolder.check_whole(folder)
    transformers_tokenizer.check(
        Path(tokenizer_source).expanduser() if tokenizer_source else folder
    )
    for note in read_shape(folder, kind)["notes"]:
        print(f"note: {note}", flush=True)
    return folder


def stage_tokenizer(
    config: TrainingConfig, model: Path | None, text: texts.Source, *, online: bool
) -> Path:
    """Return the staged folder of the tokenizer: the one given, the model's, or one for `text`.

    Raises:
        UserError: it is not a tokenizer, or there is no text to train one on.
    """
    given = config.model.tokenizer
    source = Path(given).expanduser() if given else model
    if source is not None:
        return place_tokenizer(source, given or config.model.name)
    assert config.model.preset is not None
    vocab_size = PRESETS[config.model.preset].vocab_size
    return make_once(
        named_by_content(datasets_folder() / "tokenizers", "trained", vocab_size, text.made_of),
        lambda out: tokenization.train(text.read(), vocab_size, out, text.name),
        f"a tokenizer trained on {text.name}",
        online=online or text.is_local,
    )


def place_tokenizer(source: Path, name: str) -> Path:
    """Return the staged folder of the tokenizer of `source`, a folder or a file of one.

    Raises:
        UserError: it is not a tokenizer.
    """
    home = source if source.is_dir() else source.parent
    hashes = [
        hashlib.sha256((home / file).read_bytes()).hexdigest()
        for file in (*tokenization.FILES, "config.json")
        if (home / file).is_file()
    ]
    return make_once(
        named_by_content(
            datasets_folder() / "tokenizers", tokenization.FORMAT, source.name, hashes
        ),
        lambda out: transformers_tokenizer.place(source, out),
        f"the tokenizer of {name}",
    )
