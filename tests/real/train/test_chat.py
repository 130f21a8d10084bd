"""`make chat` and `make generate` as a person starts them: a terminal, a pipe; host and image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fast.train import chat_model
from tests.real.cluster.login.screen import Screen
from tests.shared import CHECKOUT
from tests.waiting import state_of, wait_until

# So long that nobody waits for an answer's end.
ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that never ends its turn."""
    folder = chat_model.write(tmp_path_factory.mktemp("models") / "chat")
    for name, changed in (
        ("config.json", {"max_position_embeddings": ENDLESS}),
        ("generation_config.json", {"suppress_tokens": [chat_model.EOS, chat_model.END_OF_TURN]}),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | changed))
    return folder


@pytest.fixture(params=["host", pytest.param("apptainer", marks=pytest.mark.needs("apptainer"))])
def variables(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a user whose commands run on the host, or in the image."""
    ours = {
        "VENV": sys.prefix,
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "RUNTIME": request.param,
    }
    (tmp_path / "inputrc").write_text("set enable-bracketed-paste off\n")
    ours["INPUTRC"] = str(tmp_path / "inputrc")
    if request.param == "apptainer":
        ours["SLUICE_IMAGES"] = str(request.getfixturevalue("image").parent)
    kept = ("PATH", "HOME", "APPTAINER", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | ours


@pytest.mark.computes(1)
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    model: Path, variables: dict[str, str]
) -> None:
    words = f"ARGS=--temperature 0 --max_new_tokens {ENDLESS // 4}"
    with Screen(["make", "chat", f"MODEL={model}", words], variables) as screen:
        screen.expect("you> ")
        screen.type("caf\u00e9 x\x7fforbidden\r")
        screen.expect("error: the chat template refuses it: No such word\r\nyou> ")
        assert "caf\u00e9" in screen.shown.decode()
        for _ in range(2):
            screen.type("Hi\r")
            # The echo of what was typed, then the answer.
            screen.expect(r"Hi\r\n[^\r\n]{5}")
            screen.type("\x03")
            screen.expect(r"\(stopped\)\r\n\r\nyou> ")
        screen.type("half a line")
        screen.expect("half a line")
        # Python loses a Ctrl+C in the moment before its readline waits for a key.
        wait_until(lambda: set(map(state_of, screen.others())) <= {"", "S"}, "it waits for a key")
        screen.type("\x03")
        screen.expect(r"\(Ctrl\+D or /exit ends\)\r\nyou> ")
        before = screen.shown
        screen.type("\x04")
        screen.wait()
    assert b"Traceback" not in screen.shown
    assert b"error" not in screen.shown[len(before) :]


# What the host does with a pipe, the image does behind Apptainer's.
@pytest.mark.needs("apptainer")
@pytest.mark.parametrize("variables", ["apptainer"], indirect=True)
@pytest.mark.computes(1)
def test_a_pipe_is_a_prompt_or_a_turn_per_line(model: Path, variables: dict[str, str]) -> None:
    prompt = "two\nlines  $HOME \\ #"
    words = ["ARGS=--max_new_tokens 1 --temperature 0", f"MODEL={model}"]
    texts = []
    for more, given in (([], f"{prompt}\n"), ([f"PROMPT={prompt}"], "no")):
        done = subprocess.run(
            ["make", "generate", *words, *more],
            input=given,
            cwd=CHECKOUT,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        )
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert texts[0].startswith(prompt)
    done = subprocess.run(
        ["make", "chat", *words],
        input="Hi\nGo on\n",
        cwd=CHECKOUT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 2 and "you>" not in done.stdout
