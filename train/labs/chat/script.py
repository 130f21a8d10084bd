"""Lab 5: fine-tune a pretrained language model on conversations.

    make dry-run JOB=chat
    make run JOB=chat ARGS="--method lora --data.train my-chats.jsonl"

Only the assistant's answers are learned. Their perplexity on held-back conversations, and sample
answers, are measured before and after the training, which is train/finetuning.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runfolder.errors import UserError
from train.engine import sampling, staging, texts, tokenization, tuning
from train.engine.config import StagedPaths
from train.engine.errors import run_to_exit
from train.engine.once import (
    datasets_folder,
    make_once,
    named_by_content,
    relative_to_datasets,
    staged_path,
)
from train.engine.script import Script
from train.labs.chat import examples, sources, template
from train.labs.chat.settings import Config

if TYPE_CHECKING:
    import torch

# What --dry_run changes; the command line still overrides it.
DRY_RUN: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 4},
    "evaluation": {"every_steps": 10},
    "checkpoint": {"every_steps": 5},
    "sample": {"prompts": ["How do I boil an egg?"], "max_new_tokens": 24},
    "max_steps": 20,
    "log_every_steps": 5,
}


def stage(config: Config, *, online: bool) -> Config:
    """Return `config` with its inputs staged; `make fetch` calls this with a network."""
    # Reported here and not after the wait in the queue, if the batch does not divide.
    config.batch.per_process(int(os.environ.get("SLUICE_WORLD_SIZE", "1")))
    staged = config.staged
    if staged is None or not staging.are_there(staged):
        staged = _stage(config, online)
    model_folder = staged_path(staged.model) if staged.model else None
    tuning.check_adapters(config, model_folder)
    shape = staging.model_shape(config, model_folder)
    sampling.check_fits(
        config.sample, _prompts(config, staged), shape["max_position_embeddings"] or 2048
    )
    return replace(config, staged=staged)


def _stage(config: Config, online: bool) -> StagedPaths:
    found = sources.find(config)
    model = staging.stage_language_model(config, online=online)
    length = staging.sequence_length(config, model)
    tokenizer_folder = _stage_tokenizer(config, model, found["train"].text, online)
    tokenizer = tokenization.load(tokenizer_folder, parse_special_tokens=True)
    folders, summaries = {}, {}
    for split, source in found.items():
        data = config.data
        folder = named_by_content(
            datasets_folder() / "conversations",
            *(examples.FORMAT, tokenizer_folder.name, source.text.made_of),
            *(data.learn, data.too_long, data.packing, length),
        )

        def make(unfinished: Path, source: sources.Source = source) -> None:
            examples.write(
                source.read(),
                source.form,
                template.Template(tokenizer_folder),
                tokenizer,
                config.data,
                length,
                unfinished,
                source.text.name,
            )

        make_once(folder, make, source.text.name, online=online or source.text.is_local)
        folders[split], summaries[split] = folder, examples.Examples(folder).summary
        if not texts.is_sample(source.text):
            texts.say(source.text.describe(summaries[split].describe()))
    known = staging.model_shape(config, model)["vocab_size"]
    used = max(summary.vocab_size for summary in summaries.values())
    if config.method == "lora" and model and used > known:
        raise UserError(
            f"data.chat_template: the conversations have ids up to {used - 1}, but the model has "
            f"only {known} tokens, and adapters cannot learn new ones; use --method full, or a "
            "template without new tokens"
        )
    texts.say_overlap({split: source.text for split, source in found.items()}, online=online)
    return StagedPaths(
        model=relative_to_datasets(model) if model else None,
        tokenizer=relative_to_datasets(tokenizer_folder),
        train=relative_to_datasets(folders["train"]),
        validation=relative_to_datasets(folders["validation"]),
    )


def _stage_tokenizer(config: Config, model: Path | None, text: texts.Source, online: bool) -> Path:
    """Return the staged tokenizer with the chat template that conversations are written with."""
    folder = staging.stage_tokenizer(config, model, text, online=online)
    given = config.data.chat_template
    if given is None and template.has_template(folder):
        return folder
    body, added = template.read(given)
    with_template = make_once(
        named_by_content(datasets_folder() / "tokenizers", "chat", folder.name, body, added),
        lambda unfinished: template.place(folder, body, added, unfinished),
        f"a tokenizer with the chat template {given or 'of docs/lab5-chat.md'}",
    )
    if given is None:
        texts.say("the tokenizer has no chat template; the one of docs/lab5-chat.md is used")
    return with_template


def _prompts(config: Config, staged: StagedPaths) -> sampling.Prompts:
    """Return the sample prompts, each as a conversation that asks for an answer."""
    folder = staged_path(staged.tokenizer)
    tokenizer = tokenization.load(folder, parse_special_tokens=True)
    writer = template.Template(folder)
    asked = [
        writer.write([{"role": "user", "content": prompt}], "sample.prompts", ask=True)
        for prompt in config.sample.prompts
    ]
    ends = examples.Examples(staged_path(staged.train)).summary.end_ids
    return sampling.Prompts(
        tokens=[tokenizer.tokenizer.encode(text, add_special_tokens=False).ids for text in asked],
        end_ids=frozenset([*ends, *tokenizer.ends]),
        tokenizer=tokenizer,
        answers_only=True,
    )


def train(config: Config, run_folder: Path, device: torch.device, *, rehearse_stop: bool) -> str:
    """Train to the end or until asked to stop; return finished, stopped or rehearsed."""
    import torch

    from train.engine import attention, models, source
    from train.finetuning import TuningData, fine_tune

    assert config.staged is not None
    tokenizer_folder = staged_path(config.staged.tokenizer)
    training, validation = (
        examples.Examples(staged_path(folder))
        for folder in (config.staged.train, config.staged.validation)
    )
    prompts = _prompts(config, config.staged)
    model, weights = tuning.pretrained(config, tokenizer_folder)
    known = model.get_input_embeddings().weight.shape[0]
    has_new = max(training.summary.vocab_size, validation.summary.vocab_size) > known
    if has_new:
        weights = models.add_tokens(model, prompts.tokenizer.vocab_size, weights)
    models.end_with(model, prompts.end_ids)
    if config.data.packing:
        length, tried = training.sequence_length, None
        if weights is not None and attention.is_plain(model, length):
            tried = models.one_layer(model.config)
        if weights is not None and tried is None:
            # Only the model itself shows what its layers do with packed examples.
            source.place_whole(model, weights, torch.device("cpu"))
            weights = None
        attention.separate_examples(model, length, tried)
    data = TuningData(
        training=training,
        validation=validation,
        prompts=prompts,
        next_command="make chat RUN=",
        # What else makes the examples other ones, by its name.
        must_match={
            f"data.{name}": getattr(config.data, name)
            for name in ("learn", "too_long", "packing", "chat_template")
        },
    )
    return fine_tune(config, model, weights, data, run_folder, device, rehearse_stop=rehearse_stop)


SCRIPT = Script(
    prog="train/labs/chat/script.py",
    config_class=Config,
    dry_run=DRY_RUN,
    stage=stage,
    train=train,
)

if __name__ == "__main__":
    run_to_exit(SCRIPT.main)
