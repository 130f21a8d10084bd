"""Ask questions about the passages of a run of the lab rag.

make ask RUN=rag Q="Who designed the bridge?"
make ask RUN=rag                                    # one question per line, until Ctrl+D
python -m train.ask runs/rag/20261122-153402-ab12cd --question "Who designed the bridge?"
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runfolder.errors import UserError
from train.engine import arguments
from train.engine.errors import run_to_exit
from train.engine.once import staged_path
from train.engine.terminal import check_utf8, printable
from train.labs.rag import corpus, indexes, passages, prompt, script
from train.labs.rag.chunks import readable
from train.labs.rag.generator import Generator
from train.labs.rag.indexes import Hit
from train.labs.rag.passages import Passage
from train.labs.rag.settings import Config, GeneratorSettings

# Below it the best passage seldom holds the answer: docs/lab4-rag.md has the measurement. It is
# for all-MiniLM-L6-v2; every encoder has its own scale.
THRESHOLD = 0.35


@dataclass(kw_only=True)
class Options:
    """Ask questions about the passages of a run of the lab rag."""

    question: str | None = None
    """The question; without one, questions are read from the terminal until Ctrl+D."""
    k: int = 3
    """Passages to find, and the most to put into the prompt."""
    threshold: float = THRESHOLD
    """The cosine below which a passage does not count as found; -1 lets every passage count."""
    max_prompt_tokens: int = 1024
    """Tokens of the prompt, passages included; the generator's tokens, else the encoder's."""
    max_new_tokens: int = 128
    """Tokens of the answer."""
    show_prompt: bool = False
    """Show the prompt as well."""
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)

    def __post_init__(self) -> None:
        if self.question is not None:
            check_question(self.question, 'Q: is empty; give a question, such as Q="Who was it?"')
        if self.k < 1:
            raise UserError(f"k: {self.k} is not positive")
        if not (math.isfinite(self.threshold) and -1 <= self.threshold <= 1):
            raise UserError(f"threshold: {self.threshold} is not a cosine, between -1 and 1")
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    if not argv or argv[0].startswith("-"):
        if "--help" not in argv and "-h" not in argv:
            raise UserError("usage: python -m train.ask RUN_FOLDER [--question TEXT] [OPTION ...]")
        argv = ["", *argv]
    run_folder = Path(argv[0])
    options = arguments.parse(Options, argv[1:], prog="train/ask.py", dry_run={})
    if options.question is None and not sys.stdin.isatty():
        raise UserError('Q: is empty, and there is no terminal to ask on; give Q="Who was it?"')
    try:
        library = Library(run_folder, options)
        if options.question is not None:
            answer(library, options.question, options)
        else:
            converse(library, options)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def check_question(text: str, otherwise: str) -> None:
    """Raise `UserError` unless `text` is a question that can be read."""
    if not text.strip():
        raise UserError(otherwise)
    check_utf8(text, "Q")


def converse(library: Library, options: Options) -> None:
    """Answer questions from the terminal until Ctrl+D."""
    with contextlib.suppress(ImportError):  # Python can be built without it
        import readline  # noqa: F401  gives input() its editing and its history

    print(f"{len(library.texts):,} passages; Ctrl+D ends")
    while True:
        try:
            text = input("question> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("that is not UTF-8 text; check the terminal's encoding")
            continue
        if not text.strip():
            continue
        try:
            check_question(text, "")
            answer(library, text, options)
        except UserError as error:
            print(f"error: {printable(str(error))}")


def answer(library: Library, question: str, options: Options) -> None:
    """Find passages, show them and, if there is a generator, an answer made from them."""
    hits, encode_s, search_s = library.find(question, options.k)
    best = hits[0].score
    kept = [hit for hit in hits if hit.score >= options.threshold]
    took = f"encoder {1000 * encode_s:.0f} ms, index {1000 * search_s:.1f} ms"
    if not kept:
        print(
            f"nothing found: the best of {len(library.texts):,} passages has score {best:.3f}, "
            f"below {options.threshold:g} (--threshold); {took}"
        )
        return
    built = None
    if options.show_prompt or library.generator is not None:
        sources = [library.source(hit) for hit in kept]
        built = prompt.build(question, sources, count=library.count, budget=library.prompt_tokens)
    print(f"found {len(kept)} of {len(library.texts):,} passages; {took}")
    for number, hit in enumerate(kept, start=1):
        passage = library.texts[hit.passage]
        title = printable(readable(passage.title)) or "(no title)"
        print(f"\n[{number}] {title}  score {hit.score:.3f}  id {printable(passage.id)}")
        print(printable(library.source(hit).text))
    if built is not None and options.show_prompt:
        print(f"\nthe prompt, {built.tokens} tokens, {built.num_sources} passages:\n")
        print(printable(built.text))
    if built is not None and library.generator is not None:
        began = time.perf_counter()
        text = library.generator.answer(built.text)
        print(f"\nanswer ({time.perf_counter() - began:.1f} s, passages 1 to {built.num_sources}):")
        print(printable(text) or "(the model generated no text)")


class Library:
    """The passages of a run with their index and encoder, and a generator if there is one."""

    texts: list[Passage]
    count: Callable[[str], int]
    """Returns the tokens that a prompt takes."""
    generator: Generator | None = None

    def __init__(self, run_folder: Path, options: Options) -> None:
        """Load them.

        Raises:
            UserError: it is not a run of the lab, has no index, or has one for something else.
        """
        config = read_config(run_folder)
        assert config.staged is not None
        if indexes.read_manifest(run_folder / "index") is None:
            raise UserError(f"{run_folder}: has no index; let the run finish, with `make run RUN=`")
        self.texts = passages.read_passages(staged_path(config.staged.passages))
        if options.k > len(self.texts):
            raise UserError(
                f"--k: {options.k} is more than the number of passages, {len(self.texts)}"
            )
        self.chunks = corpus.read_chunks(staged_path(config.staged.chunks))
        self._owners = [chunk.passage for chunk in self.chunks]
        generator = None
        if options.generator.name:
            given = options.generator
            assert given.name is not None
            generator = corpus.stage_generator(given.name, given.revision, online=False)
        elif config.staged.generator:
            generator = staged_path(config.staged.generator)

        # Only now, so that a mistake above is reported at once.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._embedder = script.load_embedder(config, device)
        made_of = script.identity(config, self._embedder)
        self._index = indexes.load(run_folder / "index", made_of)
        self._embedder.queries(["the first text of all is slow"])
        self.prompt_tokens = options.max_prompt_tokens
        if generator is None:
            self.count = self._embedder.count
        else:
            self.generator = Generator(
                generator, max_new_tokens=options.max_new_tokens, device=device
            )
            self.count = self.generator.count
            self.prompt_tokens = min(self.prompt_tokens, self.generator.prompt_tokens)

    def find(self, question: str, k: int) -> tuple[list[Hit], float, float]:
        """Return the best `k` passages, and the seconds in the encoder and in the index."""
        began = time.perf_counter()
        vectors = self._embedder.queries([question])
        embedded = time.perf_counter()
        hits = indexes.search(self._index, vectors, self._owners, k)[0]
        return hits, embedded - began, time.perf_counter() - embedded

    def source(self, hit: Hit) -> prompt.Source:
        """Return the part of a passage that was found, to show and cite."""
        passage, chunk = self.texts[hit.passage], self.chunks[hit.chunk]
        return prompt.Source(
            title=readable(passage.title), text=passage.text[chunk.start : chunk.end]
        )


def read_config(run_folder: Path) -> Config:
    """Return the settings of a run of the lab.

    Raises:
        UserError: it is not such a run, or its inputs are gone.
    """
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_folder}: has no config.yaml; give a run that `make run` started")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if "\nchunks:" not in f"\n{text}":
        raise UserError(f"{run_folder}: is not a run of the lab rag; give one, such as RUN=rag")
    config = arguments.parse(Config, ["--config", str(path)], prog="ask", dry_run=script.DRY_RUN)
    if config.staged is None:
        raise UserError(f"{path}: does not list the run's inputs; give a run of `make run`")
    for name in vars(config.staged).values():
        if name and not staged_path(name).exists():
            raise UserError(
                f"{staged_path(name)}: does not exist; set SLUICE_DATASETS to "
                "the datasets folder of the run, or stage it again with `make run RUN=...`"
            )
    return config


if __name__ == "__main__":
    run_to_exit(main)
