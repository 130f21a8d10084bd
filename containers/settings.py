"""What this machine's pip, apt and proxies are set to, for a build inside a container.

    VENV/bin/python containers/settings.py FOLDER

FOLDER is bound at /mnt while the image is built and deleted afterwards, so that nothing of it, a
password of an index least of all, is in the image. Prints the binds that it needs, a line each.
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
# What says where packages come from and how to get at them; nothing else of pip.conf is passed on.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "trusted-host",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
)
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
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
        shutil.copyfile(certificates, folder / "ca-certificates.crt")
    binds = _pip(folder)
    _apt(folder, bool(certificates))
    _environment(folder, bool(certificates))
    return binds


def _certificates() -> Path | None:
    for name in (*map(os.environ.get, ("SSL_CERT_FILE", "PIP_CERT")), *CERTIFICATES):
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
        # A file (a page of links, a wheel) is seen through its folder; and an index through the one
        # above it, because its pages refer to files beside `simple`.
        through = path.parent if is_index or not path.is_dir() else path
        binds.append(f"{through}:{MOUNT / target}:ro")
        mounted = MOUNT / target / path.relative_to(through)
        return f"file://{mounted}" if url.scheme == "file" else str(mounted)

    lines = ["[global]"]
    for key, value in _pip_settings().items():
        if key in ("index-url", "extra-index-url", "find-links"):
            is_index = key != "find-links"
            value = "\n    ".join(inside(place, is_index=is_index) for place in value.split())
        lines.append(f"{key} = {value}")
    if (folder / "ca-certificates.crt").exists():
        lines.append(f"cert = {MOUNT / 'ca-certificates.crt'}")
    # No half-read file under a name that is taken for whole, and nobody else reads passwords.
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
    # The later counts, as in pip.
    return found["global"] | found["install"] | found[":env:"]


# ---- apt ----------------------------------------------------------------------------------------


def _apt(folder: Path, has_certificates: bool) -> None:
    """Write the mirror of this machine's own release, and how it is reached."""
    if not shutil.which("apt-get") or not shutil.which("apt-config"):
        return
    target = folder / "apt"
    target.mkdir()
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    # How to fetch; not what this machine's apt runs before and after, or where it keeps things.
    lines = [
        line
        for line in dump.splitlines()
        if re.match(r"Acquire::(Check|Retries|https?::|ftp::|Max-)", line)
        and not re.search(r"::(CaInfo|CAInfo|SslCert|SslKey|Proxy-Auto-Detect)\b", line)
    ]
    if has_certificates:
        lines.append(f'Acquire::https::CAInfo "{MOUNT / "ca-certificates.crt"}";')
    passwords = [Path("/etc/apt/auth.conf"), *Path("/etc/apt/auth.conf.d").glob("*.conf")]
    texts = [path.read_text() for path in passwords if os.access(path, os.R_OK)]
    if texts:
        _write(target / "auth.conf", "\n".join(texts))
        lines.append(f'Dir::Etc::netrc "{MOUNT / "apt/auth.conf"}";')
    _write(target / "apt.conf", "\n".join(lines))
    codename = _codename()
    sources = _apt_sources(codename) if codename else []
    if sources:
        _write(target / f"{codename}.list", "\n".join(sources))


def _codename() -> str:
    try:
        text = Path("/etc/os-release").read_text()
    except FileNotFoundError:
        return ""
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', text, re.MULTILINE)
    return match[1] if match else ""


def _apt_sources(codename: str) -> list[str]:
    """Return the lines of a sources.list for this release, as this machine's apt resolves them."""
    # Not `indextargets`, which names only what has been downloaded before.
    command = ["apt-get", "update", "--print-uris"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The distribution's own archive: its keys are in the base, those of others are not.
    ours = rf"{codename}(?:-updates|-security)?"
    found = re.findall(rf"^'(\S+)/dists/({ours})/InRelease'", shown, re.MULTILINE)
    return [f"deb {site} {release} main" for site, release in dict.fromkeys(found)]


# ---- the environment ----------------------------------------------------------------------------


def _environment(folder: Path, has_certificates: bool) -> None:
    """Write what the shell in the container exports."""
    lines = []
    for name in PROXIES:
        for spelled in (name, name.upper()):
            if value := os.environ.get(spelled):
                quoted = value.replace("'", "'\\''")
                lines.append(f"export {spelled}='{quoted}'")
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        lines.append(f"export SOURCE_DATE_EPOCH={int(epoch)}")
    if has_certificates:
        lines.append(f"export SSL_CERT_FILE={MOUNT / 'ca-certificates.crt'}")
    _write(folder / "environment.sh", "\n".join(lines))


def _write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for bind in main(Path(sys.argv[1])):
        print(bind)
