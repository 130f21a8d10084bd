"""The inputs of a search, staged once: encoder, passages, chunks and the answer generator.

Without torch, so that mistakes in them are reported at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from runfolder.errors import UserError
from train.engine import pooling, staging, tokenization
from train.engine.classification import labelled
from train.engine.once import (
    datasets_folder,
    make_once,
    named_by_content,
    relative_to_datasets,
    staged_path,
)
from train.engine.presets import TINY_ENCODER_POSITIONS
from train.engine.pretrained import ENCODER, LANGUAGE_MODEL
from train.engine.rows import read_rows
from train.engine.settings import EncoderSettings
from train.engine.shape import read_shape
from train.labs.rag import chunks, passages
from train.labs.rag.chunks import Chunk, ChunkSettings
from train.labs.rag.passages import PassageDataSettings

FORMAT = 1


@dataclass(kw_only=True)
class StagedPassages:
    """Where the inputs of a search are, under $SLUICE_DATASETS."""

    model: str | None = None
    tokenizer: str = ""
    passages: str = ""
    chunks: str = ""
    generator: str | None = None


def stage(
    model: EncoderSettings,
    data: PassageDataSettings,
    settings: ChunkSettings,
    *,
    staged: StagedPassages | None,
    sample: Path | None,
    online: bool,
) -> StagedPassages:
    """Stage encoder, passages, questions and chunks, unless they are there; return the paths.

    `sample` is the folder of the embedded rows of a dry run, which replace a dataset of the hub.
    Paths in `staged` are used if they exist; chunks are cut again for other lengths.

    Raises:
        UserError: something does not exist or is wrong, a row with its line; or it would have to
            be downloaded and `online` is False.
    """
    place = relative_to_datasets
    names = [staged.model, staged.tokenizer, staged.passages] if staged else [""]
    if staged and all(staged_path(name).exists() for name in names if name):
        folder = staged_path(staged.model) if staged.model else None
        tokenizer_folder = staged_path(staged.tokenizer)
        rows = staged_path(staged.passages)
    else:
        rows = passages.stage_rows(data, sample, online)
        if model.preset is None:
            folder = staging.stage_model(model.name, model.revision, ENCODER, online=online)
            pooling.check_compared(folder)
            tokenizer_folder = staging.place_tokenizer(folder, model.name)
        else:
            folder = None
            tokenizer_folder = labelled.train_tokenizer(rows, "text", "the passages")
    prompt_tokens = pooling.prompt_tokens(folder, tokenizer_folder)
    known = max_positions(folder) - prompt_tokens
    if settings.length > known:
        beside = f" after a prompt of {prompt_tokens}" if prompt_tokens else ""
        raise UserError(
            f"chunks.length: {settings.length} is more than the {known} tokens that the encoder "
            f"reads{beside}; try --chunks.length {known}"
        )
    made_of = (FORMAT, rows.name, tokenizer_folder.name, settings.length, settings.overlap)
    cut_folder = make_once(
        named_by_content(datasets_folder() / "chunks", *made_of),
        lambda out: _write_chunks(rows, tokenizer_folder, settings, out),
        f"chunks of {settings.length} tokens",
    )
    return StagedPassages(
        model=place(folder) if folder else None,
        tokenizer=place(tokenizer_folder),
        passages=place(rows),
        chunks=place(cut_folder),
        generator=staged.generator if staged else None,
    )


def stage_generator(name: str, revision: str | None, *, online: bool) -> Path:
    """Return the folder of the model that generates answers: a folder as is, a hub id downloaded.

    Raises:
        UserError: as `staging.stage_model`.
    """
    try:
        folder = staging.stage_model(name, revision, LANGUAGE_MODEL, online=online)
        if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
            raise UserError(f"model.name: {folder} holds no tokenizer; give a whole model folder")
    except UserError as error:
        text = str(error).replace("model.", "generator.", 1)
        fetch = f'`make fetch JOB=rag ARGS="--generator.name {name}"`'
        raise UserError(text.replace("`make fetch`", fetch)) from None
    return folder


def read_chunks(folder: Path) -> list[Chunk]:
    """Return the staged chunks, in the order of their passages."""
    names = ("passage", "start", "end", "title_end", "tokens")
    rows = read_rows(folder / "rows.jsonl", {name: name for name in names})
    return [Chunk(**dict(zip(names, values, strict=True))) for _, values in rows]


def count_chunks(folder: Path) -> int:
    """Return the number of staged chunks."""
    count: int = json.loads((folder / "count.json").read_text(encoding="utf-8"))
    return count


# ---- chunks ---------------------------------------------------------------------------------


def max_positions(folder: Path | None) -> int:
    """Return the most tokens that the encoder of a model folder reads; as encoders.max_length."""
    if folder is None:
        return TINY_ENCODER_POSITIONS
    shape = read_shape(folder, ENCODER)
    positions = int(shape["max_position_embeddings"] or 8192)
    if "roberta" in shape["model_type"]:
        positions -= int(shape["pad_token_id"] or 0) + 1
    return min(positions, pooling.read(folder).max_length or positions)


def _write_chunks(
    rows: Path, tokenizer_folder: Path, settings: ChunkSettings, folder: Path
) -> None:
    loaded = tokenization.load(tokenizer_folder).tokenizer
    count = 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for number, passage in enumerate(passages.read_passages(rows)):
            for chunk in chunks.cut(
                number, passage.title, passage.text, tokenizer=loaded, settings=settings
            ):
                stream.write(json.dumps(asdict(chunk)) + "\n")
                count += 1
    (folder / "count.json").write_text(f"{count}\n", encoding="utf-8")
