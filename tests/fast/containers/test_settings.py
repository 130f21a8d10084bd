"""containers/settings.py: what of this machine's pip and apt reaches a build, and how."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import waiting
from tests.shared import CHECKOUT

CODENAME = next(
    (
        line.partition("=")[2].strip('"')
        for line in Path("/etc/os-release").read_text().splitlines()
        if line.startswith("VERSION_CODENAME=")
    ),
    "",
)


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    return waiting.run(
        [sys.executable, "-I", "containers/settings.py", folder],
        cwd=CHECKOUT,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)} | environment,
    )


def pip_conf(folder: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    parser.read(folder / "pip.conf")
    return dict(parser["global"])


def test_pips_files_and_variables_count_as_they_do_for_pip(tmp_path: Path) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "mirror/simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    (tmp_path / "own.pem").write_text("own")
    given = tmp_path / "pip.conf"
    given.write_text(
        "[global]\nindex-url = https://user:word@index.example/simple\ntimeout = 5\n"
        f"cert = {tmp_path}/own.pem\nuser = true\n[install]\ntimeout = 7\n"
    )
    folder = tmp_path / "settings"
    done = run(
        folder,
        PIP_CONFIG_FILE=str(given),
        PIP_FIND_LINKS=f"{wheels} https://wheels.example/",
        PIP_EXTRA_INDEX_URL=f"file://{index}",
    )
    assert done.returncode == 0, done.stderr
    conf = pip_conf(folder)
    assert conf["index-url"] == "https://user:word@index.example/simple"
    assert conf["timeout"] == "7"
    # Nothing but where packages come from.
    assert "user" not in conf
    assert conf["cert"] == "/mnt/pip-certificates.crt"
    assert (folder / "pip-certificates.crt").read_text() == "own"
    binds = dict(line.split(":")[:2] for line in done.stdout.splitlines())
    # Pages of an index refer to files beside `simple`.
    assert conf["extra-index-url"] == f"file://{binds[str(index.parent)]}/simple"
    assert conf["find-links"].split() == [binds[str(wheels)], "https://wheels.example/"]
    assert (folder / "pip.conf").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(shutil.which("apt-config") is None, reason="no apt on this system")
def test_apts_mirror_and_certificates_come_along_and_third_parties_do_not(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "debian.sources").write_text(
        f"Types: deb\nURIs: https://mirror.example/debian\nSuites: {CODENAME} {CODENAME}-updates\n"
        "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
    (parts / "docker.list").write_text(
        "deb [signed-by=/etc/apt/keyrings/docker.asc] https://download.example/linux/debian "
        f"{CODENAME} stable\n"
    )
    (tmp_path / "ca.pem").write_text("an authority")
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourceparts "{parts}";\nDir::Etc::sourcelist "/dev/null";\n'
        f'Acquire::https::CaInfo "{tmp_path}/ca.pem";\n'
        'Acquire::http::ProxyAutoDetect "/usr/bin/detect";\n'
        'Acquire::http::Proxy "http://proxy.example:3128/";\n'
    )
    folder = tmp_path / "settings"
    done = run(folder, APT_CONFIG=str(config), PIP_CONFIG_FILE="/dev/null")
    assert done.returncode == 0, done.stderr
    written = folder / "apt" / CODENAME
    sources = "".join(file.read_text() for file in written.glob("host.*"))
    assert "mirror.example" in sources
    assert "download.example" not in sources
    conf = (written / "apt.conf").read_text()
    assert "proxy.example:3128" in conf
    assert "detect" not in conf
    authority = next(line for line in conf.splitlines() if "CaInfo" in line).split('"')[1]
    inside = Path(authority).relative_to("/mnt")
    assert (folder / inside).read_text() == "an authority"


def test_a_missing_certificate_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "settings", PIP_CONFIG_FILE="/dev/null", PIP_CERT="/nowhere.pem")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: /nowhere.pem: No such file or directory; correct pip's or apt's settings"
    ]
