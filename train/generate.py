"""Sample text from a run.

make generate RUN=tinyllama/20261122-153402-ab12cd PROMPT="The cluster"
python -m train.generate runs/tinyllama/20261122-153402-ab12cd --prompt "The cluster"
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from runfolder.errors import UserError
from train.engine.errors import run_to_exit


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="train/generate.py", description="Sample text from a run.")
    parser.add_argument("run_folder", type=str)
    parser.add_argument("--prompt", type=str, default="")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(argv)
    if not options.prompt:
        raise UserError('PROMPT: is empty; give a beginning, such as PROMPT="The cluster"')
    if options.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens: {options.max_new_tokens} is not positive")
    if options.temperature < 0:
        raise UserError(f"--temperature: {options.temperature} is negative")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top_p: {options.top_p} is not in (0, 1]")
    model_folder = Path(options.run_folder) / "export"
    if not (model_folder / "config.json").is_file():
        raise UserError(
            f"{options.run_folder}: has no exported model; run `make export RUN=...` first"
        )
    kinds = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    endings = ("ForCausalLM", "LMHeadModel")  # the second is GPT-2's
    if not any(kind.endswith(endings) for kind in kinds.get("architectures") or ()):
        raise UserError(f"{model_folder}: is not a language model and cannot generate text")

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.to(device)
    torch.manual_seed(options.seed)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    # None: a model with computed positions, without a limit.
    context = getattr(model.config, "max_position_embeddings", None)
    room = options.max_new_tokens
    if context is not None:
        room = context - inputs["input_ids"].shape[1]
    if room < 1:
        raise UserError(f"PROMPT: is longer than the {context} tokens of the model")
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    if room < options.max_new_tokens:
        print(f"note: stops after {room} tokens, at the model's limit ({context})", file=sys.stderr)
    tokens = model.generate(
        **inputs,
        max_new_tokens=min(options.max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    run_to_exit(main)
