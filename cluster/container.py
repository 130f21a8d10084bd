"""Where the training side runs: in the image, when one is there, or on the host in .venv.

    python -m cluster.container train.generate --run RUN -- --prompt "The cluster"

A run's own container sees a few folders at fixed places (slurm/node.sh). What comes before and
after a run, as here, reads what its user names, so that the host's folders are read-only at their
own paths and a path means inside what it means outside.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import image as images
from cluster import machine, runs
from cluster.errors import Parser, run_to_exit, split_at_dashes
from runfolder.errors import UserError, did_you_mean

RUNTIMES = ("apptainer", "host")
# Of the root of a file system, what the image brings itself. /tmp is the container's own.
SYSTEM = {"boot", "dev", "etc", "lost+found", "opt", "proc", "run", "sys", "tmp", "usr", "var"}
SYSTEM |= {"bin", "sbin", "lib", "lib32", "lib64", "libx32"}
# A folder bound on one of these, or above, would hide a part of the image.
OF_THE_IMAGE = [Path("/", name) for name in SYSTEM - {"opt", "tmp", "var", "run"}]
OF_THE_IMAGE.append(Path("/opt/sluice"))
# What slurm/node.sh binds.
OF_THE_RUN = [Path("/workspace"), Path("/datasets"), Path("/run-folder"), Path("/cache")]
# Apptainer's own exit code when it could not start the command.
NOT_STARTED = 255


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The image and the command to run it with; neither of them on the host."""

    image: images.Image | None = None
    apptainer: str = ""
    why_host: str = "no container"

    def __str__(self) -> str:
        """How it is said: in images/sluice-cpu.sif."""
        return f"in {self.image.path}" if self.image else f"on the host, {self.why_host}"

    def record(self) -> dict[str, Any]:
        """Return what run.json says of it."""
        if self.image is None:
            variant = machine.environment_variant()
            lock = images.lock_sha256(variant) if variant else None
            return {"runtime": "host", "image": None, "lock_sha256": lock}
        return {
            "runtime": "apptainer",
            "image": {"path": str(self.image.path.absolute()), "sha256": self.image.sha256},
            "lock_sha256": self.image.lock_sha256,
        }


def choose(runtime: str, image: str, variants: Sequence[str]) -> Runtime:
    """Return where to run: in `image`, or in the first of `variants` that is there, or the host.

    On the host, its environment is made or completed. With `runtime` empty an image decides.

    Raises:
        UserError: what was asked for is not there, or the image must not be used.
    """
    if runtime not in ("", *RUNTIMES):
        raise UserError(f"RUNTIME={runtime}: is unknown{did_you_mean(runtime, RUNTIMES)}")
    if runtime == "host":
        return _host("no container")
    places = [Path(image)] if image else [images.named(variant) for variant in variants]
    path = next((place for place in places if place.exists()), None)
    if path is None and (image or runtime == "apptainer"):
        raise UserError(
            f"{f'IMAGE={image}' if image else 'RUNTIME=apptainer'}: there is no {places[0]}; "
            f"build it: make build-image VARIANT={variants[0]}, or take RUNTIME=host"
        )
    if path is None:
        return _host("no container")
    apptainer = images.find_apptainer()
    if apptainer is None and runtime == "apptainer":
        raise UserError(f"RUNTIME=apptainer: {images.no_apptainer()}")
    if apptainer is None:
        return _host(f"not in {path}: {images.no_apptainer()}")
    return Runtime(image=images.check(path), apptainer=apptainer)


def _host(why: str) -> Runtime:
    machine.complete_environment()
    return Runtime(why_host=why)


def variants(*, gpus: bool, strict: bool) -> list[str]:
    """Return the variants of the image that serve, the better first; `strict`: no CPU on GPUs."""
    if gpus:
        return ["cuda"] if strict else ["cuda", "cpu"]
    return ["cpu", "cuda"]


# ---- a command beside a run -----------------------------------------------------------------


def call(
    runtime: Runtime,
    module: str,
    arguments: Sequence[str],
    *,
    code: Path,
    environment: Mapping[str, str],
    writable: Iterable[Path] = (),
    online: bool = False,
) -> int:
    """Run a module of the training side with the code of `code`; return its exit code.

    Inside it may write to `writable`, folders that exist, and read what `arguments` and the files
    of settings among them name.

    Raises:
        UserError: a path that it needs cannot be shown to it, or the container does not start.
    """
    # -P: the code of `code`, not that of the current folder.
    words = ["-P", "-m", module, *arguments]
    if runtime.image is None:
        # Of the caller's Python variables none gets through but this one; as in the image.
        start = ["slurm/isolated.sh", "env", f"PYTHONPATH={code}", sys.executable]
        return _call([*start, *words], environment)
    needed = [Path.cwd(), code, *(certificates(environment) if online else [])]
    if (datasets := Path(environment["SLUICE_DATASETS"])).exists():
        needed.append(datasets)
    binds = own_places([*needed, *named_paths(arguments)], writable)
    home = environment.get("HOME", "/tmp/home")
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        code_inside = code.resolve()
        # `~` means the user's own home, also in a file of settings.
        inside = ["env", f"HOME={home}", f"PYTHONPATH={code_inside}", "python", *words]
        device = environment.get("SLUICE_DEVICE") or ("cuda" if machine.gpus() else "cpu")
        options = [
            f"--image={runtime.image.path.absolute()}",
            f"--apptainer={runtime.apptainer}",
            f"--scratch={scratch}",
            f"--workdir={Path.cwd()}",
            f"--device={device}",
            f"--binds={chr(10).join(binds)}",
            *(["--online"] if online else []),
        ]
        started = {**environment, "SLUICE_DEVICE": device}
        exit_code = _call(["slurm/container.sh", *options, "--", *inside], started)
    if exit_code == NOT_STARTED:
        raise UserError(
            f"{runtime.image.path}: apptainer could not start it, the reason is above; "
            "RUNTIME=host goes without"
        )
    return exit_code


def _call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return the exit code of a command, which ends in its own time when it is interrupted.

    Ctrl+C reaches it, too, and it puts away what is half done; `subprocess.call` would kill it
    after a quarter of a second.
    """
    # A KeyboardInterrupt between the end of the child and the note of its code would lose the code,
    # and Python would say 0. This handler is not handed down.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return subprocess.Popen(command, env=environment).wait()
    finally:
        signal.signal(signal.SIGINT, before)


def values(runtime: Runtime) -> dict[str, str]:
    """Return what launch.env says of a runtime."""
    image = runtime.image
    return {
        "image": str(image.path.absolute()) if image else "",
        "image_sha256": image.sha256 if image else "",
        "apptainer": runtime.apptainer,
        "host_python": "" if image else sys.executable,
    }


# ---- the host's folders at their own paths --------------------------------------------------


def own_places(read: Iterable[Path], write: Iterable[Path]) -> list[str]:
    """Return binds that show these paths, and most of the host, where they are on the host.

    Raises:
        UserError: a path lies where the image has its own.
    """
    modes: dict[Path, str] = {}
    for path in _top_level():
        modes[path] = "ro"
    for path, mode in [(path, "ro") for path in read] + [(path, "rw") for path in write]:
        real = path.resolve()
        for place in (real, path.absolute()):
            # A link is seen where its folder is.
            if place == real or not any(parent in modes for parent in place.parents):
                _check_place(place)
                modes[place] = "rw" if "rw" in (mode, modes.get(place)) else "ro"
    kept: dict[Path, str] = {}
    for place in sorted(modes):
        above = next((kept[parent] for parent in place.parents if parent in kept), None)
        if above != modes[place] and above != "rw":
            kept[place] = modes[place]
    return [bind(place, place, mode) for place, mode in kept.items()]


def _top_level() -> Iterator[Path]:
    for path in Path("/").iterdir():
        if path.name not in SYSTEM and path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            yield path


def _check_place(path: Path) -> None:
    for own in OF_THE_IMAGE:
        inside = path.is_relative_to(own) and not path.is_relative_to("/usr/local/")
        # A single file there hides nothing else.
        hides = own.is_relative_to(path) or (inside and (path.is_dir() or own.name == "sluice"))
        if hides and path.parts[:2] != ("/", "dev"):
            raise UserError(
                f"{path}: lies where the image has its own {own}; move it, or take RUNTIME=host"
            )


def bind(source: Path, target: Path, mode: str) -> str:
    """Return a line of binds, as slurm/container.sh takes them.

    Raises:
        UserError: it would not be one line of three parts.
    """
    for path in (source, target):
        if ":" in str(path) or "\n" in str(path):
            raise UserError(
                f"{str(path)!r}: a path with a colon cannot be bound; rename it, or take "
                "RUNTIME=host"
            )
    return f"{source}:{target}:{mode}"


def named_paths(arguments: Iterable[str]) -> list[Path]:
    """Return the paths that exist among the words of a command and in its files of settings."""
    found = []
    for word in arguments:
        if word.startswith(("--prompt=", "--question=")):
            continue  # text, whatever it looks like
        value = word.partition("=")[2] if word.startswith("--") and "=" in word else word
        if path := _existing(value):
            found.append(path)
            found += _in_settings(path)
    return found


def _in_settings(path: Path) -> list[Path]:
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return []
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        # Whoever reads it for its settings says what is wrong with it.
        return []
    return [found for text in _strings(content) if (found := _existing(text))]


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in content.values() if isinstance(content, dict) else ():
        yield from _strings(part)


def _existing(text: str) -> Path | None:
    if not text or text.startswith("-"):
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        # Too long for a name, or not one at all: a prompt, for instance.
        return None


def certificates(environment: Mapping[str, str]) -> list[Path]:
    """Return the host's certificates and token that the environment names and that exist."""
    names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HF_TOKEN_PATH")
    paths = [Path(environment[name]) for name in names if environment.get(name)]
    return [path for path in paths if path.is_file()]


# ---- what a run reads besides its folders ---------------------------------------------------


def extra_binds(config: Any, datasets: Path) -> list[str]:
    """Return binds for what a resolved config reads from outside the datasets folder.

    That is a model's folder of the user's own, at its own path, and the targets of links.

    Raises:
        UserError: it lies where a run's container has something else.
    """
    staged = config.get("staged") if isinstance(config, dict) else None
    binds: dict[Path, Path] = {}
    for name in staged.values() if isinstance(staged, dict) else ():
        if not isinstance(name, str):
            continue
        path = datasets / name
        if Path(name).is_absolute():
            binds[path] = path.resolve()
            # The hub's cache has its files as links to another folder.
            for file in path.iterdir() if path.is_dir() else ():
                target = (
                    Path(os.path.normpath(path / file.readlink())) if file.is_symlink() else path
                )
                if not target.is_relative_to(path):
                    binds[target] = file.resolve()
        elif not path.resolve().is_relative_to(datasets.resolve()):
            binds[path.resolve()] = path.resolve()
    for target in binds:
        _check_place(target)
        for own in OF_THE_RUN:
            if target.is_relative_to(own):
                raise UserError(
                    f"{target}: lies where the container of a run has its own {own}; move it, or "
                    "take RUNTIME=host"
                )
    return [bind(binds[target], target, "ro") for target in sorted(binds)]


# ---- the command ----------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    own, words = split_at_dashes(argv)
    parser = Parser(
        prog="python -m cluster.container",
        usage="%(prog)s MODULE --run RUN [OPTION ...] [-- WORD ...]",
        description="Run a module of the training side on a run's folder.",
        allow_abbrev=False,
    )
    parser.add_argument("module", help="such as train.export")
    parser.add_argument("--run", default="", help="the run")
    parser.add_argument("--runtime", default="", help="apptainer or host; else an image decides")
    parser.add_argument("--image", default="", help="the image")
    options = parser.parse_args(own)
    folder = runs.find(options.run)
    variants_wanted = variants(gpus=bool(machine.gpus()), strict=False)
    runtime = choose(options.runtime, options.image, variants_wanted)
    print(f"note: {runtime}", file=sys.stderr, flush=True)
    environment = {
        **os.environ,
        "SLUICE_DATASETS": str(runs.datasets_folder()),
        "PYTHONNOUSERSITE": "1",
    }
    # The model and its tokenizer may lie at paths of their own.
    arguments = [str(folder), *words]
    return call(
        runtime,
        options.module,
        arguments,
        code=Path.cwd(),
        environment=environment,
        writable=[folder, *_outputs(words)],
    )


def _outputs(words: Sequence[str]) -> list[Path]:
    """Return the folders that exist in which `--output` is to be made."""
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
    # What nobody may write needs no place inside.
    return [place for place in found if place.is_dir() and os.access(place, os.W_OK)]


if __name__ == "__main__":
    run_to_exit(main)
