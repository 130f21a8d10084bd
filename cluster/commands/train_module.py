"""`make export`, `make generate` and the like: a training module on a run's folder, or a model's.

python -m cluster train-module train.generate --run RUN -- --prompt "The cluster"
python -m cluster train-module train.chat --model FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import Parser, split_at_dashes
from cluster.plan import container, machine
from cluster.plan.runtime import choose_runtime, variants
from cluster.runs import folders
from runfolder.errors import UserError


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    own, words = split_at_dashes(argv)
    parser = Parser(
        prog="python -m cluster train-module",
        usage="%(prog)s MODULE (--run RUN | --model FOLDER) [OPTION ...] [-- WORD ...]",
        description="Run a training module on a run's folder, or a model's.",
        allow_abbrev=False,
    )
    parser.add_argument("module", help="such as train.export")
    parser.add_argument("--run", default="", help="the run")
    parser.add_argument("--model", default="", help="a Hugging Face model folder, instead")
    parser.add_argument("--runtime", default="", help="apptainer or host (default: what is there)")
    parser.add_argument("--image", default="", help="the image")
    options = parser.parse_args(own)
    if options.model and options.run:
        raise UserError("RUN: give it or MODEL, not both")
    folder = Path(options.model).expanduser() if options.model else folders.find(options.run)
    if not folder.is_dir():
        raise UserError(f"MODEL={options.model}: there is no such folder")
    variants_wanted = variants(gpus=bool(machine.gpus()), strict=False)
    runtime = choose_runtime(options.runtime, options.image, variants_wanted)
    print(f"note: {runtime}", file=sys.stderr, flush=True)
    environment = {
        **os.environ,
        "SLUICE_DATASETS": str(folders.datasets_folder()),
        "PYTHONNOUSERSITE": "1",
    }
    # The model and its tokenizer may be at paths of their own.
    arguments = [str(folder), *words]
    return container.call(
        runtime,
        options.module,
        arguments,
        code=Path.cwd(),
        environment=environment,
        writable=[*([] if options.model else [folder]), *_outputs(words)],
        reads_input=True,
    )


def _outputs(words: Sequence[str]) -> list[Path]:
    """Return the existing folders in which `--output` is to be created."""
    found = []
    for number, word in enumerate(words):
        name, given, value = word.partition("=")
        if name != "--output":
            continue
        value = value if given else "".join(words[number + 1 : number + 2])
        place = Path(value).absolute().parent
        while not place.exists():
            place = place.parent
        found.append(place)
    # A folder that cannot be written need not be bound.
    return [place for place in found if place.is_dir() and os.access(place, os.W_OK)]
