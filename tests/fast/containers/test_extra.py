"""containers/extra.py: what a file of packages may hold, and what pip's refusal means."""

from __future__ import annotations

from pathlib import Path

import pytest

from containers import extra

SECRET = "hunter2"


def test_requirements_are_taken_without_comments_and_with_continued_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(
        "\ufeff# a comment\n\ntrl  # another\npeft[test] >= 0.18, <1 ; python_version < '4'\n"
        "einops==0.8.* \\\n  ; sys_platform == 'linux'\nopen_clip~=3.0\\\n"
    )
    assert extra.main([str(file)]) == 0
    assert capsys.readouterr() == (
        "trl\npeft[test] >= 0.18, <1 ; python_version < '4'\n"
        "einops==0.8.*    ; sys_platform == 'linux'\nopen_clip~=3.0\n",
        "",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no package"),
        ("# trl\n", "names no package"),
        ("trl\n\nfoo=1", "line 3: 'foo=1' is not a requirement, such as trl>=1.0"),
        ("trl \\\n>=1\nfoo 1", "line 3: 'foo 1' is not"),
        ("trl>=1,", "line 1: 'trl>=1,' is not"),
        (f"--index-url https://me:{SECRET}@host", "line 1: --index-url does not belong here"),
        (f"trl\n-ihttps://me:{SECRET}@host/simple", "line 2: -i does not belong here"),
        (f"trl --extra-index-url=https://{SECRET}@host", "--extra-index-url does not belong here"),
        ("-r others.txt", "the option -r is not taken"),
        ("trl==1 --hash=sha256:00", "the option --hash is not taken"),
        ("-e .", "is an address or a folder"),
        ("./mine", "is an address or a folder"),
        ("mine-1.0-py3-none-any.whl", "is an address or a folder"),
        (f"mine @ https://me:{SECRET}@host/mine.whl", "is an address or a folder"),
        (f"git+https://me:{SECRET}@host/mine.git", "is an address or a folder"),
    ],
)
def test_anything_else_is_one_line_without_a_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(text)
    assert extra.main([str(file)]) == 2
    out, error = capsys.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert error.startswith(f"error: EXTRA={file}: ")
    assert said in error
    assert SECRET not in error


def test_what_is_no_file_of_text_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "utf-16").write_text("trl", encoding="utf-16")
    for name, said in (
        (tmp_path / "none", f"error: EXTRA={tmp_path}/none: there is no such file"),
        (tmp_path, f"error: EXTRA={tmp_path}: is a folder"),
        (tmp_path / "utf-16", f"error: EXTRA={tmp_path}/utf-16: is not text in UTF-8"),
        (f"https://me:{SECRET}@host/requirements.txt", "error: EXTRA=https://...: is an address"),
    ):
        assert extra.main([str(name)]) == 2
        out, error = capsys.readouterr()
        assert (out, len(error.splitlines())) == ("", 1)
        assert error.startswith(said)


# As pip 26.3 writes them.
OUTPUT = """ERROR: ResolutionImpossible:

The conflict is caused by:
    {cause}
    The user requested (constraint) {constraint}

To fix this you could try to:
1. loosen the range of package versions you've specified
"""
LOCKED = "numpy==2.4.6\ntorch==2.13.0+cpu\nhuggingface_hub==2.4.0\n"


@pytest.mark.parametrize(
    ("cause", "constraint", "said"),
    [
        (
            "The user requested torch==2.0",
            "torch<=2.14.1,==2.13.0+cpu",
            "torch==2.0 is asked for, but the lock has torch 2.13.0+cpu, and no extra package may "
            "change the lock; leave it out",
        ),
        (
            "trl 0.9.6 depends on numpy<2.0.0 and >=1.18.2",
            "numpy==2.4.6",
            "trl 0.9.6 needs numpy<2.0.0 and >=1.18.2, but the lock has numpy 2.4.6, and no extra "
            "package may change the lock; ask for another version of trl, or leave it out",
        ),
        (
            "a 1.0 depends on b==2\n    b 2 depends on huggingface-hub<1",
            "huggingface_hub==2.4.0",
            "b 2 needs huggingface-hub<1, but the lock has huggingface-hub 2.4.0, and no extra "
            "package may change the lock; ask for another version of b, or leave it out",
        ),
        # The user's own constraints, from pip.conf.
        ("The user requested spam==2", "spam<2", ""),
    ],
)
def test_the_locked_package_in_the_way_is_named(cause: str, constraint: str, said: str) -> None:
    output = OUTPUT.format(cause=cause, constraint=constraint)
    assert extra.explain(output, LOCKED) == said


def test_another_failure_is_left_to_pips_own_words() -> None:
    assert extra.explain("ERROR: No matching distribution found for nothing\n", LOCKED) == ""
