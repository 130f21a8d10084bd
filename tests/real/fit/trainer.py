"""Hugging Face's Trainer: a tiny random model, made-up data, every setting an argument."""

from pathlib import Path

import torch
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
set_seed(arguments.seed)
size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **size))
rows = torch.randint(64, (256, 16))
data = [{"input_ids": row, "labels": row} for row in rows]
# This file is written last: a checkpoint that is half written has none.
complete = Path(arguments.output_dir).glob("checkpoint-*/trainer_state.json")
newest = max((file.parent for file in complete), key=lambda c: int(c.name[11:]), default=None)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train(resume_from_checkpoint=newest and str(newest))
