"""Folders that appear at once, or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.engine.durable import folder_at_once
from train.engine.errors import RunFailed


def test_a_folder_is_there_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "export"
    for text in ("first", "second"):
        with folder_at_once(output) as folder:
            (folder / "file").write_text(text)
            assert not output.exists() or (output / "file").read_text() == "first"
        assert (output / "file").read_text() == text
        assert list(tmp_path.iterdir()) == [output]


def test_what_was_there_comes_back_if_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "export"
    with folder_at_once(output) as folder:
        (folder / "file").write_text("first")
    rename = Path.rename

    def no_space(source: Path, target: Path) -> Path:
        if ".unfinished" in source.name:
            raise OSError(28, "No space left on device")
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_space)
        said = r"export: could not be written \(.*No space left"
        with pytest.raises(RunFailed, match=said), folder_at_once(output) as folder:
            (folder / "file").write_text("second")
    assert (output / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [output]
