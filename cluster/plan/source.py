"""What is to run, before it is resolved: a job as a new run, or a run to continue."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.plan.job import JOBS, load_job
from cluster.plan.program import Program
from cluster.runs import checkout, folders
from runfolder import records
from runfolder.errors import UserError
from runfolder.files import read_json
from runfolder.records import SCRIPT_FOLDER

# A longer word is no path, but text.
MAX_PATH = 255


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to run: a job as a new run, or a run to continue with its own code and settings."""

    folder: Path
    record: dict[str, Any]
    """The run.json of a new run, or of the one to continue."""
    accel: str
    settings: Path
    """The settings file that it starts with."""
    code: Path
    is_new: bool
    script_folder: Path | None = None
    """Of a script outside the checkout, until the run has its copy."""

    @property
    def program(self) -> Program | None:
        """The script, if it is not ours."""
        found = self.record.get("program")
        return Program(**found) if found else None

    @property
    def environment(self) -> dict[str, str]:
        """The job's own variables for every process."""
        return dict(self.record.get("environment", {}))


def new_run(job_name: str, *, name: str, accel: str) -> Source:
    """Return a job as a new run; nothing is written.

    Raises:
        UserError: there is no such job, or no place for its run.
    """
    job = load_job(job_name)
    record: dict[str, Any] = {"job": job.name, "module": job.module}
    record |= {"resources": asdict(job.resources), "environment": job.environment}
    record |= {"mail": job.mail, "after": job.after}
    if job.program is not None:
        record["program"] = job.program.record()
    return Source(
        folder=folders.new_folder(job.name, name),
        record=record,
        accel=accel or "ddp",
        settings=job.path,
        code=Path.cwd(),
        is_new=True,
        script_folder=job.script_folder,
    )


def run_that_goes_on(name: str, *, accel: str) -> Source:
    """Return a run to continue.

    Raises:
        UserError: there is none, or its code is older than launch.env.
    """
    folder = folders.find(name)
    record = records.read(folder)
    if not (folder / "code/runfolder/launch.py").is_file():
        made_of = record.get("git_commit")
        where = f"a checkout of {made_of[:12]}" if made_of else "the Sluice that started it"
        raise UserError(
            f"RUN={name}: was started by an older Sluice, and this one cannot start its code; "
            f"continue it in {where}"
        )
    return Source(
        folder=folder,
        record=record,
        accel=accel or record["accel"],
        settings=folder / "config.yaml",
        code=folder / "code",
        is_new=False,
    )


def note_changed_script(source: Source) -> None:
    """Say it if a script was edited since its run began, which has its own copy."""
    program, folder = source.program, source.record.get("script_folder")
    if program is None or program.kind != "script" or folder is None:
        return
    now = Path(folder) / Path(program.name).relative_to(SCRIPT_FOLDER)
    then = source.code / program.name
    if now.is_file() and then.is_file() and now.read_bytes() != then.read_bytes():
        print(f"note: {now} has changed; the run continues with its own copy", file=sys.stderr)


def note_surprises(source: Source, words: list[str]) -> None:
    """Say it if a new run of a script that is not ours may be taken for another's, or miss a file.

    `words`: what the command line adds to the script's arguments.
    """
    program, job = source.program, source.record["job"]
    if program is None:
        return
    newest = max(folders.runs_folder().glob(f"{job}/[0-9]*/run.json"), default=None)
    before = (read_json(newest) or {}).get("script_folder") if newest else None
    own = source.script_folder
    if before and own and before != checkout.place_of(own):
        print(
            f"note: {job} also has runs of {before}: RUN={job} means the newest of all; give this "
            "one a NAME=, or its job file another name",
            file=sys.stderr,
        )
    values = (w.partition("=")[2] if w[:1] == "-" else w for w in [*program.arguments, *words])
    for value in values:
        # What a run by hand has left at the place of its checkpoints is no input.
        is_input = value not in ("", ".", program.checkpoints) and not Path(value).is_absolute()
        if not is_input or len(value) >= MAX_PATH:
            continue
        for folder in {source.settings.absolute().parent, (own or Path()).absolute()}:
            if (folder / value).exists():
                print(
                    f"note: {value}: the script looks for it in the run's folder; if it means "
                    f"{folder / value}, give that path",
                    file=sys.stderr,
                )


def command_of(target: str, source: Source, sizes: dict[str, Any], arguments: list[str]) -> str:
    """Return the make command that starts such a run again, for its record."""
    is_ours = source.settings.parent == JOBS
    job = source.record["job"] if is_ours else source.settings.absolute()
    words = ["make", target, f"JOB={job}", f"ACCEL={source.accel}"]
    words += [f"{name}={value}" for name, value in sizes.items()]
    return shlex.join([*words, f"ARGS={shlex.join(arguments)}"])
