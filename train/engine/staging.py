"""What a run reads, put in place once: model, tokenizer, packed text, below one datasets folder.

Each piece lives under a name that follows from what it was made of, so that it is found again,
and appears there by a rename, so that nobody ever reads half of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train.engine import batches, tokenizer
from train.engine.data import SAMPLES, Piece, from_hub, from_rows, pieces, text_files
from train.engine.errors import UserError, check_writable_folder
from train.engine.presets import PRESETS
from train.engine.settings import DataSettings, StagedPaths, TrainingConfig

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def datasets_folder() -> Path:
    """Return the folder for datasets: $SLUICE_DATASETS, or `datasets` in the current folder."""
    return Path(os.environ.get("SLUICE_DATASETS", "datasets")).absolute()


def staged_path(name: str) -> Path:
    """Return the place of a path of `StagedPaths`; relative ones are below the datasets folder."""
    return datasets_folder() / name


def stage(config: TrainingConfig, *, online: bool) -> StagedPaths:
    """Put model, tokenizer and packed text in place, where they are not yet, and say where.

    Raises:
        UserError: something does not exist, is not what it should be, or is too short; or it
            would have to be downloaded and `online` is False.
    """
    root = datasets_folder()
    check_writable_folder(root, "SLUICE_DATASETS")
    model = None if config.model.preset else _stage_model(config, root, online)
    tokenizer_folder = _stage_tokenizer(config, model, root, online)
    paths = {
        split: _stage_text(config.data, split, tokenizer_folder, root, config.dry_run, online)
        for split in ("train", "validation")
    }
    _check_lengths(config, model, paths)

    def relative(path: Path) -> str:
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    return StagedPaths(
        model=relative(model) if model else None,
        tokenizer=relative(tokenizer_folder),
        train=relative(paths["train"]),
        validation=relative(paths["validation"]),
    )


def model_shape(config: TrainingConfig, model: Path | None) -> dict[str, Any]:
    """Return vocab_size and max_position_embeddings of the preset or of the model's config.json."""
    if config.model.preset:
        return vars(PRESETS[config.model.preset])
    assert model is not None
    shape: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return shape


def sequence_length(config: TrainingConfig, model: Path | None) -> int:
    """Return the tokens of a block: as set, or the model's context up to 2048."""
    context = int(model_shape(config, model).get("max_position_embeddings", 2048))
    return config.data.sequence_length or min(context, 2048)


def _check_lengths(config: TrainingConfig, model: Path | None, paths: dict[str, Path]) -> None:
    length = sequence_length(config, model)
    context = int(model_shape(config, model).get("max_position_embeddings", length))
    if length > context:
        raise UserError(
            f"data.sequence_length: {length} is more than the {context} positions of the model"
        )
    blocks = batches.Blocks(paths["train"], length)
    if blocks.num_full == 0:
        raise UserError(
            f"the training text has {blocks.packed.num_tokens} tokens, less than one block of "
            f"{length}; give more text or a smaller --data.sequence_length"
        )


def _is_hub_id(name: str) -> bool:
    return not name.startswith(("/", ".", "~")) and len(name.split("/")) == 2


def _stage_model(config: TrainingConfig, root: Path, online: bool) -> Path:
    name = config.model.name
    local = Path(name).expanduser()
    if local.is_dir():
        _check_model_folder(local)
        return local.absolute()
    if not _is_hub_id(name):
        raise UserError(f"model.name: {name} is neither a folder nor a hub id (owner/name)")
    revision = config.model.revision or "main"
    folder = root / "models" / f"{name.replace('/', '--')}@{revision[:12]}"

    def download(unfinished: Path) -> None:
        from huggingface_hub import snapshot_download

        patterns = [*MODEL_FILES, *tokenizer.FILES]
        _from_network(
            f"model.name: {name} at {revision}",
            lambda: snapshot_download(
                name, revision=revision, local_dir=unfinished, allow_patterns=patterns
            ),
        )
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)
        _check_model_folder(unfinished)

    return _once(folder, download, what=f"the model {name}", needs_network=True, online=online)


def _check_model_folder(folder: Path) -> None:
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape["vocab_size"], shape["num_hidden_layers"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"model.name: {folder} holds no language model: config.json: {error}"
        ) from None
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.name: {folder} holds no *.safetensors; convert the weights first")


def _stage_tokenizer(config: TrainingConfig, model: Path | None, root: Path, online: bool) -> Path:
    given = config.model.tokenizer
    source = Path(given).expanduser() if given else model
    if source is not None:
        if not source.exists():
            raise UserError(f"model.tokenizer: {source} does not exist")
        home = source if source.is_dir() else source.parent
        fingerprints = [
            hashlib.sha256((home / name).read_bytes()).hexdigest()
            for name in tokenizer.FILES
            if (home / name).is_file()
        ]
        folder = root / "tokenizers" / _key(source.name, fingerprints)
        return _once(folder, lambda out: tokenizer.place(source, out), what="the tokenizer")
    assert config.model.preset is not None
    vocab_size = PRESETS[config.model.preset].vocab_size
    fingerprint = _text_fingerprint(config.data, "train", config.dry_run)
    folder = root / "tokenizers" / _key("trained", vocab_size, fingerprint)
    return _once(
        folder,
        lambda out: tokenizer.train(
            _text(config.data, "train", config.dry_run, online), vocab_size, out
        ),
        what="the tokenizer, trained on the text",
    )


def _stage_text(
    data: DataSettings, split: str, tokenizer_folder: Path, root: Path, dry_run: bool, online: bool
) -> Path:
    from_the_hub = data.train is None and not dry_run
    folder = root / "packed" / _key(
        batches.FORMAT, tokenizer_folder.name, _text_fingerprint(data, split, dry_run)
    )
    source = getattr(data, split) or data.name

    def make(unfinished: Path) -> None:
        loaded = tokenizer.load(tokenizer_folder)
        batches.pack(_text(data, split, dry_run, online), loaded, unfinished, f"data.{split}: {source}")

    return _once(folder, make, what=f"{source} ({split})", needs_network=from_the_hub, online=online)


def _text_fingerprint(data: DataSettings, split: str, dry_run: bool) -> list[Any]:
    """Return what the text of a split is made of: cheap to compute, changes when the text does."""
    if data.train is None and not dry_run:
        return [data.name, data.config, data.revision, split, data.text_column, data.join_rows]
    stats = [(file, file.stat()) for file in _files(data, split, dry_run)]
    files = [(str(file.absolute()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return [files, data.text_column, data.join_rows]


def _files(data: DataSettings, split: str, dry_run: bool) -> list[Path]:
    given = getattr(data, split)
    if given is None and dry_run:
        return [SAMPLES / f"{split}.txt"]
    return text_files(Path(given), f"data.{split}")


def _text(data: DataSettings, split: str, dry_run: bool, online: bool) -> Iterator[Piece]:
    if data.train is None and not dry_run:
        assert data.name is not None
        if not online:
            raise UserError(f"data.name: {data.name} is not staged; run `make fetch` first")
        rows = from_hub(
            data.name, data.config, split, data.text_column, revision=data.revision
        )
        return from_rows(rows, join_rows=data.join_rows)
    files = _files(data, split, dry_run)
    return pieces(files, text_column=data.text_column, join_rows=data.join_rows)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _once(
    folder: Path,
    make: Callable[[Path], None],
    *,
    what: str,
    needs_network: bool = False,
    online: bool = True,
) -> Path:
    """Return `folder`, made by `make` if it is not there; a second process waits for the first."""
    if folder.is_dir():
        return folder
    if needs_network and not online:
        raise UserError(f"{what} is not staged; run `make fetch` where there is a network")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock is on the folder itself, so that no lock file is left behind.
    lock = os.open(folder.parent, os.O_RDONLY)
    unfinished = folder.parent / f".{folder.name}.unfinished"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        # A download that was cut off goes on where it stopped; all else starts afresh.
        if not needs_network:
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        print(f"staging {what}", flush=True)
        make(unfinished)
        unfinished.rename(folder)
    except (UserError, OSError) as error:
        if not needs_network:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error.filename or folder.parent}: {error.strerror or error}") from None
    finally:
        os.close(lock)
    return folder


def _from_network(what: str, download: Callable[[], Any]) -> None:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        download()
    except LocalEntryNotFoundError as error:
        raise UserError(f"{what} cannot be reached: {error.__cause__ or error}") from None
    except HfHubHTTPError as error:
        raise UserError(f"{what} cannot be downloaded: {str(error).splitlines()[0]}") from None
