"""What a run reads, put in place once: model, tokenizer, packed text, below one datasets folder.

Each piece lives under a name that follows from what it was made of, so that it is found again,
and appears there by a rename, so that nobody ever reads half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.engine import batches, hub, modelfolder, tokenizer
from train.engine.data import SAMPLES, Piece, from_rows, pieces, text_files
from train.engine.errors import UserError
from train.engine.once import make_once
from train.engine.presets import PRESETS
from train.engine.rows import as_text
from train.engine.settings import StagedPaths, TrainingConfig

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def datasets_folder() -> Path:
    """Return the folder for datasets: $SLUICE_DATASETS, or `datasets` in the current folder."""
    return Path(os.environ.get("SLUICE_DATASETS", "datasets")).absolute()


def staged_path(name: str) -> Path:
    """Return the place of a path of `StagedPaths`; relative ones are below the datasets folder."""
    return datasets_folder() / name


def relative_to_datasets(path: Path) -> str:
    """Return how `StagedPaths` names a path: below the datasets folder without that folder's."""
    root = datasets_folder()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def stage(config: TrainingConfig, *, online: bool) -> StagedPaths:
    """Put model, tokenizer and packed text in place, where they are not yet, and say where.

    What `config.staged` names is taken as it is while it is there: a run goes on with the text
    that it began with.

    Raises:
        UserError: something does not exist, is not what it should be, or is too short; or it
            would have to be downloaded and `online` is False.
    """
    try:
        staged = config.staged
        if staged is None or not all(staged_path(name).exists() for name in _names(staged)):
            staged = _stage(config, online)
        _check_lengths(config, staged)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{error.filename}: {reason}" if error.filename else reason) from None
    return staged


def model_shape(config: TrainingConfig, model: Path | None) -> dict[str, Any]:
    """Return vocab_size and max_position_embeddings of the preset or of the model's config.json."""
    if config.model.preset:
        return vars(PRESETS[config.model.preset])
    assert model is not None
    return modelfolder.read_shape(model)


def sequence_length(config: TrainingConfig, model: Path | None) -> int:
    """Return the tokens of a block: as set, or the model's context up to 2048."""
    context = int(model_shape(config, model).get("max_position_embeddings", 2048))
    return config.data.sequence_length or min(context, 2048)


def _names(staged: StagedPaths) -> list[str]:
    return [
        name for name in (staged.model, staged.tokenizer, staged.train, staged.validation) if name
    ]


def _stage(config: TrainingConfig, online: bool) -> StagedPaths:
    root = datasets_folder()
    model = None
    if config.model.preset is None:
        model = stage_model(config.model.name, config.model.revision, online=online)
    tokenizer_folder = _stage_tokenizer(config, model, root, online)
    texts = {}
    for split in ("train", "validation"):
        source = _source(config, split)
        folder = named_by_content(
            root / "packed", batches.FORMAT, tokenizer_folder.name, source.fingerprint
        )

        def make(unfinished: Path, source: _Source = source) -> None:
            loaded = tokenizer.load(tokenizer_folder)
            _check_vocabulary(config, model, loaded.vocab_size)
            batches.pack(source.read(), loaded, unfinished, source.name)

        texts[split] = make_once(folder, make, source.name, online=online or source.is_local)

    return StagedPaths(
        model=relative_to_datasets(model) if model else None,
        tokenizer=relative_to_datasets(tokenizer_folder),
        train=relative_to_datasets(texts["train"]),
        validation=relative_to_datasets(texts["validation"]),
    )


def _check_lengths(config: TrainingConfig, staged: StagedPaths) -> None:
    model = staged_path(staged.model) if staged.model else None
    length = sequence_length(config, model)
    context = int(model_shape(config, model).get("max_position_embeddings", length))
    if length > context:
        raise UserError(
            f"data.sequence_length: {length} is more than the {context} positions of the model; "
            f"try --data.sequence_length {context}"
        )
    blocks = batches.Blocks(staged_path(staged.train), length)
    _check_vocabulary(config, model, blocks.packed.vocab_size)
    num_tokens = blocks.packed.num_tokens
    if blocks.num_full == 0:
        raise UserError(
            f"{_source(config, 'train').name} has {num_tokens} tokens, but a block takes "
            f"{length + 1}; give more text or a smaller --data.sequence_length"
        )
    if batches.Blocks(staged_path(staged.validation), length).num_all == 0:
        raise UserError(
            f"{_source(config, 'validation').name} has a single token, which leaves none to "
            "predict; give more text"
        )


def _check_vocabulary(config: TrainingConfig, model: Path | None, vocab_size: int) -> None:
    # A preset's vocabulary grows with the tokenizer; weights that were trained do not.
    if model is None or vocab_size <= (known := model_shape(config, model)["vocab_size"]):
        return
    raise UserError(
        f"model.tokenizer: has {vocab_size} tokens, but the model {config.model.name} knows only "
        f"{known}; leave it out to use the model's own"
    )


def stage_model(name: str, revision: str | None, *, online: bool) -> Path:
    """Return the folder of a model: a folder as it is, a hub id downloaded once.

    Raises:
        UserError: it is neither, or not whole; or it would have to be downloaded and `online` is
            False.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        modelfolder.check(local)
        return local.absolute()
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"model.name: {name} is neither a folder nor a hub id such as owner/name")
    stem = f"{name}@{revision[:12] if revision else 'main'}".replace("/", "--")

    def download(unfinished: Path) -> None:
        hub.download_model(name, revision, unfinished, [*MODEL_FILES, *tokenizer.FILES])
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)
        modelfolder.check(unfinished)

    folder = datasets_folder() / "models" / stem
    return make_once(folder, download, f"model.name: {name}", online=online, goes_on=True)


def _stage_tokenizer(config: TrainingConfig, model: Path | None, root: Path, online: bool) -> Path:
    given = config.model.tokenizer
    source = Path(given).expanduser() if given else model
    if source is not None:
        if not source.exists():
            raise UserError(f"model.tokenizer: {source} does not exist")
        return place_tokenizer(source, given or config.model.name)
    assert config.model.preset is not None
    vocab_size = PRESETS[config.model.preset].vocab_size
    text = _source(config, "train")
    return make_once(
        named_by_content(root / "tokenizers", "trained", vocab_size, text.fingerprint),
        lambda out: tokenizer.train(text.read(), vocab_size, out, text.name),
        f"a tokenizer trained on {text.name}",
        online=online or text.is_local,
    )


def place_tokenizer(source: Path, name: str) -> Path:
    """Return the staged folder of the tokenizer of `source`, a folder or a file of one.

    Raises:
        UserError: it is no tokenizer.
    """
    home = source if source.is_dir() else source.parent
    hashes = [
        hashlib.sha256((home / file).read_bytes()).hexdigest()
        for file in tokenizer.FILES
        if (home / file).is_file()
    ]
    return make_once(
        named_by_content(datasets_folder() / "tokenizers", source.name, hashes),
        lambda out: tokenizer.place(source, out),
        f"the tokenizer of {name}",
    )


@dataclass(frozen=True)
class _Source:
    """The text of a split: its name in messages, what it is made of, and the way to read it."""

    name: str
    fingerprint: list[Any]
    """Cheap to compute, and another when the text is."""
    read: Callable[[], Iterator[Piece]]
    is_local: bool


def _source(config: TrainingConfig, split: str) -> _Source:
    data, given = config.data, getattr(config.data, split)
    if given is None and not config.dry_run:
        assert data.name is not None
        hub_id, column = data.name, data.text_column
        return _Source(
            f"data.name: {hub_id} ({split})",
            [hub_id, data.config, data.revision, split, column, data.join_rows],
            lambda: from_rows(
                (
                    as_text(text, where, column)
                    for where, (text,) in hub.dataset_rows(
                        hub_id, data.config, data.revision, split, {"text_column": column}
                    )
                ),
                join_rows=data.join_rows,
            ),
            is_local=False,
        )
    setting = f"data.{split}"
    files = text_files(Path(given), setting) if given else [SAMPLES / f"{split}.txt"]
    return _Source(
        f"{setting}: {given}" if given else f"the embedded sample ({split})",
        [fingerprint(files), data.text_column, data.join_rows],
        lambda: pieces(files, text_column=data.text_column, join_rows=data.join_rows),
        is_local=True,
    )


def fingerprint(files: Iterable[Path]) -> list[Any]:
    """Return what tells files from others, and from themselves once changed; unread."""
    stats = [(str(file.absolute()), file.stat()) for file in files]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def named_by_content(parent: Path, *made_of: Any) -> Path:
    """Return the folder below `parent` whose name follows from what it is made of (JSON)."""
    return parent / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
