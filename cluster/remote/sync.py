"""The checkout, copied from a laptop to the cluster: complete, verified, and only once.

On the cluster it is in FOLDER/checkouts/KEY, where KEY is a hash of its content. It is filled under
another name and renamed when every file has the right hash, so nothing ever runs from an incomplete
copy; what an interrupted transfer left there is not sent again. FOLDER/current links to the newest,
for work by hand there. A job of one's own, outside the checkout, is in FOLDER/jobs/KEY likewise.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import shlex
import socket
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from cluster.login.transport import Transport
from cluster.plan.job import Job
from cluster.runs import checkout
from cluster.site.settings import FOLDERS, Site
from runfolder.errors import UserError
from runfolder.records import SCRIPT_FOLDER

# How many checkouts to keep there: somebody may still follow a log with the code of an older one.
KEPT = 10
# The lock files of the commands' environment there (containers/venv.sh).
LOCKS = ("pip", "base", "torch-cpu", "cpu")


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What is copied: the bytes of each file by its path, and which files are executable."""

    contents: dict[str, bytes]
    executable: frozenset[str]
    kind: Literal["checkouts", "jobs"]

    @property
    def manifest(self) -> str:
        """The lines that sha256sum checks."""
        lines = [
            f"{hashlib.sha256(content).hexdigest()}  {name}\n"
            for name, content in sorted(self.contents.items())
        ]
        return "".join(lines)

    @property
    def key(self) -> str:
        """A name for exactly these files."""
        text = self.manifest + "\0".join(sorted(self.executable))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def environment(self) -> str:
        """A name for the Python environment that these files need: another lock, another one."""
        locks = [self.contents.get(f"containers/locks/{name}.txt", b"") for name in LOCKS]
        return hashlib.sha256(b"".join(locks)).hexdigest()[:16]

    def packed(self, names: set[str]) -> bytes:
        """Return these files as a compressed tar file."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as archive:
            for name in sorted(names):
                entry = tarfile.TarInfo(name)
                # Not 1970: a file system that purges old files would delete them.
                entry.mtime = int(time.time())
                entry.size = len(self.contents[name])
                entry.mode = 0o755 if name in self.executable else 0o644
                archive.addfile(entry, io.BytesIO(self.contents[name]))
        return stream.getvalue()


def pack(site: Site) -> Parcel:
    """Return the checkout in the current folder, with the site's file, as it is copied.

    Raises:
        UserError: a file cannot be read, or has a name that sha256sum would escape.
    """
    assert site.source is not None
    state = checkout.state()
    # On the cluster those are links to folders that are kept.
    code = [file for file in state.files if file.parts[0] not in FOLDERS]
    contents, executable = _read(Path(), code)
    try:
        contents["site.toml"] = site.source.read_bytes()
    except OSError as error:
        raise _unreadable(error) from None
    contents |= checkout.origin(state)
    return Parcel(contents=contents, executable=executable, kind="checkouts")


def pack_job(job: Job) -> Parcel:
    """Return a job outside the checkout as it is copied: its file, and its script's folder.

    Raises:
        UserError: a file cannot be read, or has a name that sha256sum would escape; or the script
            is in the checkout, which the copy of the job's file would not find.
    """
    content = yaml.safe_load(job.path.read_text(encoding="utf-8"))
    contents: dict[str, bytes] = {}
    executable: frozenset[str] = frozenset()
    if root := job.script_folder:
        state = checkout.state(root)
        files, marked = _read(root, state.files)
        files |= checkout.origin(state, folder=f"{socket.gethostname()}:{root.resolve()}")
        contents = {f"{SCRIPT_FOLDER}/{name}": bytes_ for name, bytes_ in files.items()}
        executable = frozenset(f"{SCRIPT_FOLDER}/{name}" for name in marked)
        content["folder"] = SCRIPT_FOLDER
        if "script" in content:
            assert job.program is not None
            job.program.check_copied(contents, job.path)
            content["script"] = job.program.name
    elif "script" in content:
        raise UserError(
            f"JOB={job.path}: names a script of the checkout and is not in it; put it there to "
            "submit it from a laptop"
        )
    contents[job.path.name] = yaml.safe_dump(content, sort_keys=False).encode()
    return Parcel(contents=contents, executable=executable, kind="jobs")


def _read(root: Path, files: Iterable[Path]) -> tuple[dict[str, bytes], frozenset[str]]:
    """Return the bytes of files below `root` by their names, and which are executable."""
    contents: dict[str, bytes] = {}
    executable = set()
    try:
        for file in files:
            name = file.as_posix()
            if "\n" in name or "\\" in name or not _is_utf_8(name):
                raise UserError(f"{name!r}: a file with this name cannot be copied; rename it")
            contents[name] = (root / file).read_bytes()
            if (root / file).stat().st_mode & 0o100:
                executable.add(name)
    except OSError as error:
        raise _unreadable(error) from None
    return contents, frozenset(executable)


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename}: cannot be read: {error.strerror}")


def _is_utf_8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def bring(transport: Transport, site: Site, parcel: Parcel) -> str:
    """Copy a parcel to the cluster; return the absolute path of its folder there.

    Raises:
        UserError: it cannot be written there, or the connection was lost.
    """
    # Two commands at once have folders of their own until one of them is complete.
    token = secrets.token_hex(4)
    said = transport.ask(_script(BEGIN, site, parcel, token), parcel.manifest.encode()).decode()
    folder, _, has = said.partition("\n")
    lines = has.splitlines()
    if lines[-1:] == ["complete"]:
        return folder
    for line in lines:
        if line.startswith("changed "):
            kept = f"{folder.rpartition('/')[0]}/{line.removeprefix('changed ')}"
            print(f"note: {folder} was changed there, and is kept as {kept}", file=sys.stderr)
    there = {line.removesuffix(": OK") for line in lines if line.endswith(": OK")}
    missing = set(parcel.contents) - there
    packed = parcel.packed(missing)
    of = f" of {len(parcel.contents)}" if there else ""
    size = f"{len(packed) / 1e6:.1f} MB"
    print(f"{site.ssh.host}: {len(missing)}{of} files to {folder}, {size}", file=sys.stderr)
    transport.ask(_script(FINISH, site, parcel, token), packed)
    return folder


def home(site: Site) -> str:
    """Return Sluice's folder on the cluster as a word of a bash script."""
    folder = site.ssh.folder
    if folder == "~" or folder.startswith("~/"):
        folder = folder[2:]
    # Relative to the home folder, where the script may not be: a profile can go elsewhere.
    return shlex.quote(folder) if folder.startswith("/") else f'"$HOME"/{shlex.quote(folder)}'


def _script(text: str, site: Site, parcel: Parcel, token: str) -> str:
    # Folders that the site has elsewhere are not created here.
    own = [kind for kind in FOLDERS if not getattr(site.paths, kind)]
    values = {
        "key": parcel.key,
        "token": token,
        "kind": parcel.kind,
        "shared": " ".join([*own, ".apptainer"]),
        "environment": parcel.environment,
    }
    words = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    return f"top={home(site)} {' '.join(words)}\n{text}"


# Prints the folder, then "complete", or which files are there already.
BEGIN = """
set -eu
mkdir -p -- "$top/$kind"
cd -- "$top/$kind"
# A site's file may contain what others should not read.
chmod 700 .
printf '%s/%s\\n' "$(pwd -P)" "$key"
manifest=".$key.$token.manifest" partial=".$key.$token.partial"
cat >"$manifest"
check() { (cd -- "$1" && LC_ALL=C sha256sum --check "../$manifest" 2>/dev/null); }
if [ -d "$key" ]; then
  if check "$key" >/dev/null; then
    touch -- "$key"
    if [ "$kind" = checkouts ]; then ln -sfn -- "checkouts/$key" ../current; fi
    rm -- "$manifest"
    echo complete
    exit
  fi
  mv -T -- "$key" "$key.changed-$token"
  echo "changed $key.changed-$token"
fi
mkdir -- "$partial"
# What another transfer has left, or is still copying: files that are right are not sent again.
for other in ".$key."*.partial; do
  if [ "$other" != "$partial" ] && ! cp -rp -- "$other/." "$partial/" 2>/dev/null; then
    echo "$other goes on, or has just ended"
  fi
done
check "$partial" || echo incomplete
"""

FINISH = f"""
set -eu
cd -- "$top/$kind"
manifest=".$key.$token.manifest" partial=".$key.$token.partial"
tar -xzf - -C "$partial"
(cd -- "$partial" && LC_ALL=C sha256sum --check --quiet --strict "../$manifest" >&2)
if [ "$kind" = checkouts ]; then
  for name in $shared; do
    mkdir -p -- "../$name"
    ln -sfn -- "../../$name" "$partial/$name"
  done
  mkdir -p -- "../environments/$environment"
  ln -sfn -- "../../environments/$environment" "$partial/.venv"
fi
# The same, copied at the same time by another command, will do.
if [ -d "$key" ] || ! mv -T -- "$partial" "$key"; then
  [ -d "$key" ]
  rm -rf -- "$partial"
fi
rm -- "$manifest"
if [ "$kind" = checkouts ]; then ln -sfn -- "checkouts/$key" ../current; fi
# Only our own, and never half of one under its own name.
ls -1t | grep -xE '[0-9a-f]{{16}}' | tail -n +{KEPT + 1} | while IFS= read -r old; do
  mv -T -- "$old" ".$old.gone.partial"
  rm -rf -- ".$old.gone.partial"
done
find . -maxdepth 1 -name '.*.partial' -mmin +1440 -exec rm -rf -- {{}} +
find . -maxdepth 1 -name '.*.manifest' -mmin +1440 -exec rm -f -- {{}} +
"""
