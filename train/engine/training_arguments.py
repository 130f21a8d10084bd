"""What transformers' TrainingArguments and its example scripts call our settings."""

from __future__ import annotations

# As of transformers 5.23: TrainingArguments, and examples/pytorch/language-modeling/run_clm.py. The
# first of ours counts that a script has.
OURS = {
    "learning_rate": ("optimizer.lr",),
    "weight_decay": ("optimizer.weight_decay",),
    "adam_beta1": ("optimizer.beta1",),
    "adam_beta2": ("optimizer.beta2",),
    "adam_epsilon": ("optimizer.eps",),
    "max_grad_norm": ("optimizer.max_grad_norm",),
    "lr_scheduler_type": ("schedule.kind",),
    "warmup_steps": ("schedule.warmup_steps",),
    "num_train_epochs": ("num_epochs", "max_steps"),
    "per_device_train_batch_size": ("batch.micro_batch_size", "batch_size"),
    "gradient_accumulation_steps": ("batch.global_batch_size",),
    "block_size": ("data.sequence_length", "data.max_length"),
    "max_seq_length": ("data.sequence_length", "data.max_length"),
    "model_name_or_path": ("model.name",),
    "dataset_name": ("data.name",),
    "dataset_config_name": ("data.config",),
    "train_file": ("data.train",),
    "validation_file": ("data.validation",),
    "logging_steps": ("log_every_steps",),
    "eval_steps": ("evaluation.every_steps",),
    "save_steps": ("checkpoint.every_steps",),
    "save_total_limit": ("checkpoint.keep",),
    "output_dir": ("run_folder",),
    "torch_compile": ("compile",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "ddp_timeout": ("timeout_s",),
}
