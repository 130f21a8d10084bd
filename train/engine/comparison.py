"""What the fine-tuning changed: the perplexity, and the continuations of the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runfolder.files import write_atomically
from train.engine.story import say

# The model before or after: its step, its scores, and a text for each prompt.
View = dict[str, Any]
COMPARED = ("validation_perplexity", "bits_per_byte")


def compare(prompts: Sequence[str], run_folder: Path, before: View, after: View) -> None:
    """Print what the training changed, and keep the texts in samples.jsonl."""
    lines = []
    for number, prompt in enumerate(prompts):
        say(f"prompt  {prompt}")
        for when, view in (("before", before), ("after", after)):
            text = view["texts"][number]
            say(f"{when:<7} {' '.join(text.split())}")
            lines.append({"when": when, "step": view["step"], "prompt": prompt, "text": text})
    write_atomically(
        run_folder / "samples.jsonl",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
    )
    say(f"{'':<22}{'before':>10}{'after':>10}")
    for key in COMPARED:
        say(f"{key:<22}{before[key]:>10.4g}{after[key]:>10.4g}")
