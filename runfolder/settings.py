"""The settings of a run, config.yaml; beside it those of before, until the new ones are taken."""

from __future__ import annotations

from pathlib import Path

from runfolder.files import write_atomically


def replace(run: Path, text: str) -> None:
    """Put new settings into a run; `settle` says what becomes of those of before.

    Raises:
        OSError: they cannot be written; the run has those of before.
    """
    settings, before = run / "config.yaml", run / "config.before.yaml"
    write_atomically(before, settings.read_text(encoding="utf-8"))
    write_atomically(settings, text)


def settle(run: Path, *, refused: bool) -> None:
    """Put the settings of before back if the new ones were refused, and forget them otherwise."""
    before = run / "config.before.yaml"
    if before.exists() and refused:
        # A rename, for which a full disk has room.
        before.replace(run / "config.yaml")
    before.unlink(missing_ok=True)
