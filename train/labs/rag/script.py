"""Lab 4: retrieval for generation. An index of vectors finds the passages that answer a question.

    make dry-run JOB=rag                                     # two processes, no network
    make fetch JOB=rag && make run JOB=rag NPROC=2
    make ask RUN=rag Q="Who designed the bridge?"

Reads top to bottom. What is not the idea of this script lives in train/engine.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.attempts import write_outcome
from runfolder.errors import UserError
from runfolder.moments import reached
from train.engine import signals
from train.engine.data import SAMPLES
from train.engine.durable import sha256
from train.engine.errors import RunFailed, run_to_exit
from train.engine.once import relative_to_datasets, staged_path
from train.engine.script import Script, only_under_ddp
from train.engine.story import say
from train.labs.rag import corpus, indexes, passages
from train.labs.rag.indexes import IndexSettings
from train.labs.rag.scores import DEPTH, measure, say_scores
from train.labs.rag.settings import Config

if TYPE_CHECKING:
    import numpy as np
    import torch

    from train.labs.rag.chunks import Chunk
    from train.labs.rag.embedder import Embedder

# What --dry_run changes; the command line still overrides it.
DRY_RUN: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "chunks": {"length": 64, "overlap": 8},
    "batch_size": 4,
    "checkpoint": {"every_steps": 5},
    "log_every_steps": 5,
}


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with its inputs staged; `make fetch` calls this with a network."""
    only_under_ddp("rag")
    sample = SAMPLES / "rag" if config.dry_run else None
    staged = corpus.stage(
        config.model, config.data, config.chunks, staged=config.staged, sample=sample, online=online
    )
    if config.generator.name:
        folder = corpus.stage_generator(
            config.generator.name, config.generator.revision, online=online
        )
        staged = replace(staged, generator=relative_to_datasets(folder))
    count = corpus.count_chunks(staged_path(staged.chunks))
    max_steps = -(-count // config.batch_size)
    # A resumed run has the steps that it started with.
    if config.staged is None and config.max_steps not in (1, max_steps):
        raise UserError(
            f"max_steps: {config.max_steps} does not match {count:,} chunks in batches of "
            f"{config.batch_size} ({max_steps:,}); leave it out, or give batch_size"
        )
    return replace(config, staged=staged, max_steps=max_steps)


def load_embedder(config: Config, device: torch.device) -> Embedder:
    """Return the encoder that `config` names, for passages and questions."""
    from train.engine import encoders
    from train.labs.rag.embedder import Embedder

    assert config.staged is not None
    folder = staged_path(config.staged.model) if config.staged.model else None
    tokenizer_folder = staged_path(config.staged.tokenizer)
    model = encoders.load(folder, tokenizer_folder, config.seed)
    return Embedder(model, tokenizer_folder, config.chunks.length, device)


def identity(config: Config, embedder: Embedder) -> dict[str, Any]:
    """Return what the vectors depend on; vectors of another identity are not comparable."""
    from train.engine.encoders import pooling_of
    from train.engine.models import weights_sha256

    assert config.staged is not None
    model = config.model
    is_of_the_hub = model.preset is None and not Path(model.name).is_dir()
    pooling = pooling_of(embedder.model)
    wanted = {
        "pooling": pooling.mode,
        "query_prompt": pooling.query_prompt,
        "document_prompt": pooling.document_prompt,
    }
    return {
        # Older indexes lack these keys; their encoders all had these values.
        **{k: v for k, v in wanted.items() if v not in ("mean", "")},
        "encoder": f"{model.preset}, random weights" if model.preset else model.name,
        "revision": model.revision if is_of_the_hub else None,
        "weights_sha256": weights_sha256(embedder.model),
        "dimension": embedder.dimension,
        "chunk_length": config.chunks.length,
        "chunk_overlap": config.chunks.overlap,
        "passages_sha256": sha256(staged_path(config.staged.passages) / "rows.jsonl"),
        "chunks_sha256": sha256(staged_path(config.staged.chunks) / "rows.jsonl"),
    }


def train(config: Config, run_folder: Path, device: torch.device, *, rehearse_stop: bool) -> str:
    """Embed, index and measure, until asked to stop; return finished, stopped or rehearsed."""
    import numpy as np
    import torch

    from train.engine import checkpoint_reader, metrics, strategy
    from train.engine.distributed import agree, is_main_process, rank, world_size
    from train.engine.strategy.base import assert_same_weights
    from train.labs.rag import search, vectors

    if (accel := strategy.name_from_environment()) != "ddp":
        raise UserError(
            f"ACCEL={accel}: is for training a model, and this lab does not train; leave it out"
        )

    # ---- data ----
    assert config.staged is not None
    texts = passages.read_passages(staged_path(config.staged.passages))
    chunks = corpus.read_chunks(staged_path(config.staged.chunks))
    questions = passages.read_questions(staged_path(config.staged.passages))
    size, max_steps = config.batch_size, config.max_steps
    batches = batches_of(chunks, size)
    assert len(batches) == max_steps

    # ---- encoder, resume ----
    embedder = load_embedder(config, device)
    assert_same_weights(embedder.model, device)
    made_of = identity(config, embedder)
    checkpoints = vectors.VectorCheckpoints(run_folder / "checkpoints", config.checkpoint)
    last = checkpoints.newest()
    step = 0
    if last is not None:
        state = checkpoint_reader.read_state(last)
        indexes.check_identity(state["made_of"], {**made_of, "batch_size": size}, last)
        step = state["step"]
    record = None
    if is_main_process():
        record = metrics.Metrics(run_folder, max_steps=max_steps, resume_step=step)
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        say(
            f"{world_size()} x {device_name}: {len(texts):,} passages in {len(chunks):,} chunks, "
            f"{len(questions):,} questions; {max_steps:,} batches of {size} chunks"
        )
        say(f"resuming from {last.name}, step {step}" if last else "starting at step 0")
    timer = metrics.StepTimer(warmup_steps=1)
    state = {"made_of": {**made_of, "batch_size": size}, "world_size": world_size()}
    unsaved: dict[int, np.ndarray] = {}

    # ---- embed: in each round every rank takes its next batch ----
    stopping = rehearsing = False
    while step < max_steps:
        started = time.perf_counter()
        broken = 0.0
        if step + rank() < max_steps:
            batch = batches[step + rank()]
            found = embedder.documents([texts[chunks[i].passage].stretch(chunks[i]) for i in batch])
            broken = float(not np.isfinite(found).all())
            unsaved |= dict(zip(batch, found, strict=True))
        stops, broken = agree(signals.received() is not None, broken, device=device)
        if broken:
            raise RunFailed(f"step {step + 1}: a vector is not finite; check the model's weights")
        reached("after-step")
        before, step = step, min(step + world_size(), max_steps)
        tokens = sum(chunks[i].tokens for batch in batches[before:step] for i in batch)
        timer.add(tokens=tokens, seconds=time.perf_counter() - started, data_seconds=0.0)

        if record:
            record.progress(step)
        if record and passed(config.log_every_steps, before, step) and step < max_steps:
            record.write(progress_line(step, batches, chunks, timer.take()))
        if rehearse_stop and not rehearsing and step >= max(1, max_steps // 2):
            rehearsing = True
            signals.rehearse()
        stopping = stops > 0
        if stopping or step == max_steps or passed(config.checkpoint.every_steps, before, step):
            checkpoints.save_vectors(step, unsaved, state)
            unsaved = {}
        if stopping:
            break

    # ---- index: one rank writes it, all load it ----
    index = None
    if not stopping:
        search.publish_index(config.index, run_folder, len(chunks), made_of)
        index = indexes.load(run_folder / "index", made_of)

    # ---- measure: each rank takes its share of the questions ----
    scores: dict[str, float] = {}
    if index is not None and questions:
        exact = None
        if config.index.kind != "flat":
            everything = vectors.load(checkpoints.newest_folder(), len(chunks))
            exact = indexes.build(everything, IndexSettings())
        owners = [chunk.passage for chunk in chunks]
        to_search = (index, exact)
        answers = search.find_all(questions, embedder, to_search, owners, size, DEPTH, device)
        stopping = answers is None
        if answers is not None:
            scores = measure([question.passage for question in questions], answers[0]) | answers[1]
            if is_main_process():
                search.write_predictions(run_folder, questions, texts, answers[0])

    # ---- finish ----
    if record:
        line = progress_line(step, batches, chunks, timer.take()) | scores
        if not stopping:
            record.write(line)
            say_scores(scores, len(questions))
        record.close()
        newest = checkpoints.newest_folder().name
        if stopping:
            name = signals.received() or "another rank's signal"
            say(f"stopped by {name} at step {step}; saved as {newest}")
            outcome: dict[str, Any] = {"outcome": "stopped", "reason": name}
        else:
            outcome = {"outcome": "finished", **timer.summary(), "metrics": line}
            outcome["command"] = 'make ask RUN= Q="..."'
        if not rehearsing or not stopping:
            write_outcome(run_folder, **outcome, step=step, checkpoint=newest)
    if stopping:
        return "rehearsed" if rehearsing else "stopped"
    return "finished"


def batches_of(chunks: list[Chunk], size: int) -> list[list[int]]:
    """Return the batches of chunks to embed, by their numbers; the same for any number of ranks.

    Chunks of similar length share a batch, which saves padding. The longest come first, so that a
    batch that is too large for the memory fails at once.
    """
    order = sorted(range(len(chunks)), key=lambda i: (-chunks[i].tokens, i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def passed(every: int, before: int, step: int) -> bool:
    """Return whether there is a multiple of `every` above `before`, up to `step`."""
    return step // every > before // every


def progress_line(
    step: int, batches: list[list[int]], chunks: list[Chunk], rates: dict[str, float]
) -> dict[str, Any]:
    """Return the line of metrics of a step, with the chunks and tokens done since the start."""
    done = [chunks[i] for batch in batches[:step] for i in batch]
    return {"step": step, "chunks": len(done), "tokens": sum(c.tokens for c in done)} | rates


SCRIPT = Script(
    prog="train/labs/rag/script.py", config_class=Config, dry_run=DRY_RUN, stage=stage, train=train
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
