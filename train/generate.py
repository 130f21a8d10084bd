"""Sample text from a run.

make generate RUN=tinyllama/20261122-153402-ab12cd PROMPT="The cluster"
echo "The cluster" | make generate RUN=tinyllama
python -m train.generate runs/tinyllama/20261122-153402-ab12cd --prompt "The cluster"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from runfolder.errors import UserError
from train.engine.arguments import gives
from train.engine.errors import run_to_exit
from train.engine.generation import Sampling, Writer, find_model, parse
from train.engine.terminal import check_utf8, show


@dataclass(kw_only=True)
class Options(Sampling):
    """Sample text from a run's export, or from a Hugging Face model folder."""

    prompt: str = ""
    """The beginning; without one, it is read from standard input."""
    prompt_file: str = ""
    """A file with the beginning; a newline at its end is left out."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    folder, options = parse(Options, argv, "train.generate")
    prompt = read_prompt(options, is_given=gives(argv, "prompt"))
    writer = Writer(find_model(folder), options)
    ids = writer.tokenizer(prompt)["input_ids"]
    room = writer.room(ids)
    if room < 1:
        raise UserError(f"PROMPT: is longer than the {writer.context} tokens of the model")
    if room < options.max_new_tokens:
        note = f"note: stops after {room} tokens, at the model's limit ({writer.context})"
        print(note, file=sys.stderr)
    show(writer.tokenizer.decode(ids + writer.write(ids), skip_special_tokens=True))
    return 0


def read_prompt(options: Options, *, is_given: bool) -> str:
    """Return the prompt: the one on the command line, that of the file, or standard input.

    Raises:
        UserError: there is none, or more than one, or it cannot be read or is not UTF-8.
    """
    if is_given and options.prompt_file:
        raise UserError("PROMPT: give it or PROMPT_FILE, not both")
    if is_given or (not options.prompt_file and sys.stdin.isatty()):
        where, prompt = "PROMPT", options.prompt
        check_utf8(prompt, where)
    else:
        where = f"PROMPT_FILE={options.prompt_file}" if options.prompt_file else "standard input"
        if not options.prompt_file:
            print("note: the prompt is read from standard input", file=sys.stderr, flush=True)
        try:
            file = options.prompt_file
            data = Path(file).read_bytes() if file else sys.stdin.buffer.read()
            # Every editor ends a file with it, and `echo` a line.
            prompt = data.decode().removesuffix("\n")
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{where}: is not UTF-8 text") from None
    if not prompt:
        raise UserError(f'{where}: is empty; give a beginning, such as PROMPT="The cluster"')
    return prompt


if __name__ == "__main__":
    run_to_exit(main)
