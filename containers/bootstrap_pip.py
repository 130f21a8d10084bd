"""Install pip into a virtual environment that has none, using only the standard library.

Run it with that environment's interpreter: ``.venv/bin/python containers/bootstrap_pip.py LOCK``.

The lock pins pip's version and hashes. The wheel is looked for where pip itself would look
(pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, PIP_PROXY), over
connections that trust what pip would trust (PIP_CERT, REQUESTS_CA_BUNDLE, SSL_CERT_FILE,
PIP_TRUSTED_HOST). Whatever the source, only bytes with a locked hash are run.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import http.client
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT_S = 30


class BootstrapError(Exception):
    """pip could not be installed; the message says what, where and what to do next."""


def locked_pip(lock: Path) -> tuple[str, set[str]]:
    """Return the version of pip that ``lock`` pins, and the sha256 digests that it allows."""
    text = lock.read_text(encoding="utf-8")
    version = re.search(r"^pip==([0-9.]+)", text, re.MULTILINE)
    digests = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", text))
    if not version or not digests:
        raise BootstrapError(f"{lock}: no line 'pip==VERSION' with --hash=sha256:...; restore it")
    return version[1], digests


# ---- where pip is configured to look --------------------------------------------------------


def config_files() -> list[Path]:
    """The configuration files that pip reads, weakest first (``pip config debug`` lists them)."""
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    home = Path.home()
    xdg_dirs = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    xdg_home = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path(folder) / "pip/pip.conf" for folder in reversed(xdg_dirs.split(os.pathsep))]
    files.append(Path("/etc/pip.conf"))
    files.append(home / ".pip/pip.conf")
    if sys.platform == "darwin":
        files.insert(0, Path("/Library/Application Support/pip/pip.conf"))
        files.append(home / "Library/Application Support/pip/pip.conf")
    files.append(xdg_home / "pip/pip.conf")
    if named:
        files.append(Path(named))
    return files


def pip_settings() -> dict[str, str]:
    """pip's settings by their long option names: files first, then PIP_* over them."""
    settings: dict[str, str] = {}
    for file in config_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as reason:
            raise BootstrapError(f"{file}: cannot be read ({reason}); correct it") from reason
        for section in ("global", "install"):
            if parser.has_section(section):
                settings |= {key.replace("_", "-"): value for key, value in parser[section].items()}
    for key, value in os.environ.items():
        if key.startswith("PIP_") and value:
            settings[key.removeprefix("PIP_").lower().replace("_", "-")] = value
    return settings


def sources(settings: dict[str, str]) -> list[str]:
    """The addresses of the pages (or folders) that may name pip's wheel, in pip's order."""
    found = settings.get("find-links", "").split()
    if settings.get("no-index", "").lower() not in ("1", "true", "yes", "on"):
        indexes = [settings.get("index-url", DEFAULT_INDEX)]
        indexes += settings.get("extra-index-url", "").split()
        found += [f"{index.rstrip('/')}/pip/" for index in indexes]
    return found


# ---- reading pages and files ---------------------------------------------------------------


def opener_for(settings: dict[str, str], host: str) -> urllib.request.OpenerDirector:
    """An opener with pip's proxy and certificates for ``host``."""
    trusted = {name.rpartition(":")[0] or name for name in settings.get("trusted-host", "").split()}
    if host in trusted:
        # The bytes are verified by their hash in any case.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        # SSL_CERT_FILE and SSL_CERT_DIR are known to the ssl module itself.
        bundle = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE")
        if bundle and not Path(bundle).exists():
            raise BootstrapError(f"{bundle}: this CA bundle does not exist; correct PIP_CERT")
        folder = bundle if bundle and Path(bundle).is_dir() else None
        context = ssl.create_default_context(
            cafile=None if folder else bundle or None, capath=folder
        )
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if proxy := settings.get("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    return urllib.request.build_opener(*handlers)


def without_credentials(url: str) -> str:
    """``url`` without user and password, for messages."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def read(url: str, settings: dict[str, str]) -> bytes:
    """The content at ``url``; user:password in the address become basic authentication."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(without_credentials(url))
    if parts.username:
        pair = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
        basic = f"Basic {base64.b64encode(pair.encode()).decode()}"
        # Unredirected: another host must not see the password.
        request.add_unredirected_header("Authorization", basic)
    with opener_for(settings, parts.hostname or "").open(request, timeout=TIMEOUT_S) as answer:
        return bytes(answer.read())


class Links(HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for name, value in attrs if name == "href" and value]


def address_of(wheel: str, source: str, settings: dict[str, str]) -> str | None:
    """The address of the file ``wheel`` in ``source``, a folder or a page, if it is there."""
    if "://" not in source:
        source = Path(source).expanduser().absolute().as_uri()
    parts = urllib.parse.urlsplit(source)
    if parts.scheme == "file":
        path = Path(urllib.request.url2pathname(parts.path))
        if path.name == wheel:
            return source
        if path.is_dir():
            if (path / wheel).is_file():
                return (path / wheel).as_uri()
            source = (path / "index.html").as_uri()
            if not (path / "index.html").is_file():
                return None
    page = Links()
    page.feed(read(source, settings).decode("utf-8", errors="replace"))
    for target in page.targets:
        address = urllib.parse.urljoin(source, target.partition("#")[0])
        if urllib.parse.unquote(address.rpartition("/")[2]) == wheel:
            # A file on the host of its page is fetched with the page's user and password.
            found, its_page = urllib.parse.urlsplit(address), urllib.parse.urlsplit(source)
            if found.netloc == its_page.netloc.rpartition("@")[2]:
                found = found._replace(netloc=its_page.netloc)
            return found.geturl()
    return None


def fetch_wheel(wheel: str, digests: set[str], settings: dict[str, str]) -> bytes:
    """Return the bytes of ``wheel`` from the first source that has it with a locked hash."""
    refusals = []
    for source in sources(settings):
        shown = without_credentials(source)
        try:
            address = address_of(wheel, source, settings)
            if address is None:
                refusals.append(f"{shown} does not have it")
                continue
            content = read(address, settings)
        # No connection, no trust, no such page; a broken answer; a malformed address.
        except (OSError, http.client.HTTPException, ValueError) as reason:
            refusals.append(f"{shown} could not be read ({getattr(reason, 'reason', reason)})")
            continue
        if hashlib.sha256(content).hexdigest() in digests:
            return content
        refusals.append(f"{shown} has another file under this name (its sha256 differs)")
    raise BootstrapError(
        f"{wheel}: {'; '.join(refusals) or 'pip has no package source configured'}; "
        "check the network and pip's configuration, or install your system's python3-venv"
    )


# ---- run -----------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Install the locked pip into the environment whose interpreter runs this."""
    try:
        if len(arguments) != 1 or sys.prefix == sys.base_prefix:
            raise BootstrapError(
                "bootstrap_pip.py: needs a virtual environment's own interpreter and the path of "
                "a lock; run containers/venv.sh, which passes both"
            )
        version, digests = locked_pip(Path(arguments[0]))
        wheel = f"pip-{version}-py3-none-any.whl"
        content = fetch_wheel(wheel, digests, pip_settings())
    except (BootstrapError, OSError) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    # The wheel is downloaded and verified, so the user's settings for finding it do not matter.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / wheel
        path.write_bytes(content)
        command = [sys.executable, "-I", str(path / "pip"), "install", "--quiet", "--no-index"]
        command += ["--no-deps", "--disable-pip-version-check", str(path)]
        return 2 if subprocess.run(command, env=environment, check=False).returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
