"""Talk with the model of a run, by its tokenizer's chat template.

make chat RUN=causal_lm
make chat MODEL=my-model ARGS="--system 'Answer in one sentence.'"
printf 'Hello\nGo on.\n' | make chat RUN=causal_lm          # each line is a turn
python -m train.chat runs/causal_lm/20261122-153402-ab12cd --temperature 0
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

from runfolder.errors import UserError, printable
from runfolder.exit_codes import EXIT_BAD_INPUT
from train.conversation import Conversation
from train.engine.errors import run_to_exit
from train.engine.generation import Sampling, Writer, find_model, parse
from train.engine.terminal import check_utf8, show

HELP = """\
/system TEXT  set the system turn; without TEXT, remove it
/reset        forget what was said; the system turn stays
/exit         end, as Ctrl+D does
/help         this list
Ctrl+C stops an answer. Put a space before a message that begins with a slash."""


@dataclass(kw_only=True)
class Options(Sampling):
    """Talk with a run's export, or with a Hugging Face model folder.

    At a terminal, /help lists the commands. Otherwise each line of standard input is a turn, and
    blank lines are skipped.
    """

    max_new_tokens: int = 512
    """The most tokens of an answer."""
    system: str = ""
    """The system turn, which comes before all others."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    folder, options = parse(Options, argv, "train.chat")
    check_utf8(options.system, "--system")
    try:
        folder = find_model(folder)
        conversation = Conversation(folder, Writer(folder, options), options.max_new_tokens)
        conversation.set_system(options.system)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return answer_lines(conversation)
        print(f"{folder}; /help lists the commands, Ctrl+D ends", flush=True)
        converse(conversation)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def answer_lines(conversation: Conversation) -> int:
    """Answer each line of standard input; return the exit code, 2 if one could not be answered."""
    code = 0
    try:
        for line in sys.stdin:
            if not line.strip():
                continue
            try:
                check_utf8(line, "standard input")
                conversation.answer(line.removesuffix("\n"), _show_piece)
                print(flush=True)
            except UserError as error:
                _complain(error)
                code = EXIT_BAD_INPUT
    except UnicodeDecodeError:
        raise UserError("standard input: is not UTF-8 text") from None
    return code


def converse(conversation: Conversation) -> None:
    """Answer what is typed at the terminal, until Ctrl+D or /exit."""
    with contextlib.suppress(ImportError):  # Python can be built without it
        import readline  # noqa: F401  gives input() its editing and its history

    while True:
        try:
            text = input("you> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl+D or /exit ends)")
            continue
        except UnicodeDecodeError:
            _complain(UserError("this is not UTF-8 text; check the terminal's encoding"))
            continue
        if text.strip() == "/exit":
            return
        try:
            check_utf8(text, "this")
            if text.startswith("/"):
                command(conversation, text)
            elif text.strip():
                conversation.answer(text, _show_piece)
                print("\n")
        except KeyboardInterrupt:
            print("\n(stopped)\n")
        except UserError as error:
            _complain(error)


def command(conversation: Conversation, line: str) -> None:
    """Carry out a line that begins with a slash.

    Raises:
        UserError: it is not a command.
    """
    name, _, text = line.partition(" ")
    if name == "/system":
        before = conversation.system
        conversation.set_system(text.strip())
        if not text.strip():
            print(f"(removed: {printable(before)})" if before else "(there is no system turn)")
    elif name == "/reset":
        conversation.turns = []
        print("(what was said is forgotten)")
    elif name == "/help":
        print(HELP)
    else:
        raise UserError(f"{name} is not a command; /help lists them")


def _show_piece(text: str) -> None:
    show(text, end="")


def _complain(error: UserError) -> None:
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_to_exit(main)
