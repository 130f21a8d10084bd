"""TRL's SFTTrainer: fine-tune a model folder on conversations, every setting an argument."""

from pathlib import Path

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
script, arguments, model = parser.parse_args_and_config()
conversations = load_dataset("json", data_files=script.dataset_name, split="train")
# This file is written last: a checkpoint that is half written has none.
complete = Path(arguments.output_dir).glob("checkpoint-*/trainer_state.json")
newest = max((file.parent for file in complete), key=lambda c: int(c.name[11:]), default=None)
trainer = SFTTrainer(model=model.model_name_or_path, args=arguments, train_dataset=conversations)
trainer.train(resume_from_checkpoint=newest and str(newest))
trainer.save_model()
