"""A run's settings, config.yaml; beside it the previous ones, until the new ones are accepted."""

from __future__ import annotations

from pathlib import Path

from runfolder.files import write_atomically


def replace(run: Path, text: str) -> None:
    """Give a run new settings; `settle` decides what happens to the previous ones.

    Raises:
        OSError: they cannot be written; the run keeps the previous ones.
    """
    settings, before = run / "config.yaml", run / "config.before.yaml"
    write_atomically(before, settings.read_text(encoding="utf-8"))
    write_atomically(settings, text)


def settle(run: Path, *, refused: bool) -> None:
    """Restore the previous settings if the new ones were refused; otherwise delete them."""
    before = run / "config.before.yaml"
    if before.exists() and refused:
        # A rename works on a full disk, too.
        before.replace(run / "config.yaml")
    before.unlink(missing_ok=True)
