"""Export this machine's settings of pip, apt and proxies, for a build inside a container.

    VENV/bin/python containers/settings.py FOLDER

FOLDER is bound at /mnt while the image is built and deleted afterwards, so that nothing of it, such
as the password of an index, is in the image. Prints the binds that it needs, one per line.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

MOUNT = Path("/mnt")
# The package sources and how to reach them; nothing else from pip.conf is passed on.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "trusted-host",
    "proxy",
    "cert",
    "timeout",
    "default-timeout",
    "retries",
)
# A setting of apt that names a file of this machine.
APT_FILE = r'(Acquire::https::\S*(?:CaInfo|SslCert|SslKey)) "(/.+)";'
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
CERTIFICATES_NAME = "ca-certificates.crt"
# Where systems keep the certificates that they trust: Debian, Red Hat, SUSE.
CERTIFICATES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
)


def main(folder: Path) -> list[str]:
    """Write the settings below `folder`; return binds, as SOURCE:TARGET."""
    certificates = _certificates()
    if certificates:
        shutil.copyfile(certificates, folder / CERTIFICATES_NAME)
    binds = _pip(folder)
    _apt(folder)
    _environment(folder)
    return binds


def _certificates() -> Path | None:
    for name in (os.environ.get("SSL_CERT_FILE"), *CERTIFICATES):
        if name and Path(name).is_file():
            return Path(name)
    return None


# ---- pip ----------------------------------------------------------------------------------------


def _pip(folder: Path) -> list[str]:
    """Write pip.conf, with local folders under names that exist in the container."""
    binds: list[str] = []

    def inside(place: str, *, is_index: bool) -> str:
        url = urlsplit(place)
        path = Path(unquote(url.path)) if url.scheme in ("", "file") else None
        if path is None or not path.exists():
            return place
        target = f"local/{len(binds)}"
        (folder / target).mkdir(parents=True)
        path = path.absolute()
        # Of a file (a page of links, a wheel) its folder is bound; of an index the folder above it,
        # because its pages refer to files beside `simple`.
        through = path.parent if is_index or not path.is_dir() else path
        binds.append(f"{through}:{MOUNT / target}:ro")
        mounted = MOUNT / target / path.relative_to(through)
        return f"file://{mounted}" if url.scheme == "file" else str(mounted)

    settings = _pip_settings()
    if given := settings.pop("cert", None):
        shutil.copyfile(given, folder / "pip-certificates.crt")
        settings["cert"] = str(MOUNT / "pip-certificates.crt")
    elif (folder / CERTIFICATES_NAME).exists():
        settings["cert"] = str(MOUNT / CERTIFICATES_NAME)
    lines = ["[global]"]
    for key, value in settings.items():
        if key in ("index-url", "extra-index-url", "find-links"):
            is_index = key != "find-links"
            value = "\n    ".join(inside(place, is_index=is_index) for place in value.split())
        lines.append(f"{key} = {value}")
    _write(folder / "pip.conf", "\n".join(lines))
    return binds


def _pip_settings() -> dict[str, str]:
    """Return pip's own settings for `pip install`, files and PIP_* variables taken together."""
    command = [sys.executable, "-I", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        match = re.fullmatch(r"(global|install|:env:)\.([\w-]+)=(['\"].*['\"])", line)
        if match and match[2] in PIP_SETTINGS:
            found[match[1]][match[2]] = ast.literal_eval(match[3])
    # Later ones take precedence, as in pip.
    return found["global"] | found["install"] | found[":env:"]


# ---- apt ----------------------------------------------------------------------------------------


def _apt(folder: Path) -> None:
    """Write the mirror of this machine's own release, and how it is reached."""
    codename = _codename()
    if not codename:
        return
    target = folder / "apt" / codename
    target.mkdir(parents=True)
    command: list[str | Path] = ["containers/mirror.sh", target]
    subprocess.run(command, env=os.environ | {"SUITE": codename}, check=True)
    settings = target / "apt.conf"
    if not settings.exists():
        return
    inside = MOUNT / "apt" / codename
    lines: list[str] = []
    for line in settings.read_text(encoding="utf-8").splitlines():
        # A program of this machine that is not in the container.
        if re.match(r"Acquire::https?::Proxy-?Auto-?Detect\b", line, re.IGNORECASE):
            continue
        file = re.fullmatch(APT_FILE, line, re.IGNORECASE)
        if file and Path(file[2]).is_file():
            name = f"{len(lines)}.pem"
            shutil.copyfile(file[2], target / name)
            line = f'{file[1]} "{inside / name}";'
        lines.append(line)
    if (target / "auth.conf").exists():
        lines.append(f'Dir::Etc::netrc "{inside / "auth.conf"}";')
    if (folder / CERTIFICATES_NAME).exists() and not any("CaInfo" in line for line in lines):
        lines.append(f'Acquire::https::CaInfo "{MOUNT / CERTIFICATES_NAME}";')
    _write(settings, "\n".join(lines))


def _codename() -> str:
    try:
        text = Path("/etc/os-release").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', text, re.MULTILINE)
    return match[1] if match else ""


# ---- the environment ----------------------------------------------------------------------------


def _environment(folder: Path) -> None:
    """Write what the shell in the container exports."""
    lines = []
    for name in PROXIES:
        for spelled in (name, name.upper()):
            if value := os.environ.get(spelled):
                quoted = value.replace("'", "'\\''")
                lines.append(f"export {spelled}='{quoted}'")
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        lines.append(f"export SOURCE_DATE_EPOCH={int(epoch)}")
    if (folder / CERTIFICATES_NAME).exists():
        lines.append(f"export SSL_CERT_FILE={MOUNT / CERTIFICATES_NAME}")
    _write(folder / "environment.sh", "\n".join(lines))


def _write(path: Path, text: str) -> None:
    # There are passwords in some of these.
    path.touch(mode=0o600)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        for bind in main(Path(sys.argv[1])):
            print(bind)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["the reason is above"]
        sys.exit(f"error: {error.cmd[0]} {error.cmd[-1]}: {said[-1]}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}; correct pip's or apt's settings")
