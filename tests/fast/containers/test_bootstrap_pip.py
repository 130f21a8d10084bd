"""containers/bootstrap_pip.py: where pip's wheel is looked for, and which bytes are taken.

That they are installed is shown in tests/real/containers/test_venv.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

import pytest

from containers import bootstrap_pip
from containers.bootstrap_pip import BootstrapError
from tests.package_index import link, pose_as, serving

WHEEL, CONTENT = "pip-26.0-py3-none-any.whl", b"a wheel"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
# A simple index, with a relative link and a hash, as indexes do.
INDEX = {
    "/simple/pip/": link(f"../../files/{WHEEL}#sha256={DIGEST}"),
    f"/files/{WHEEL}": CONTENT,
}


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("PIP_", "SSL_CERT_", "REQUESTS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def fetched(monkeypatch: pytest.MonkeyPatch, **settings: str) -> bytes:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return bootstrap_pip.fetch_wheel(WHEEL, {DIGEST}, bootstrap_pip.pip_settings())


def test_the_lock_gives_the_version_and_its_digests(tmp_path: Path) -> None:
    lock = tmp_path / "pip.txt"
    lock.write_text(f"pip==26.0 \\\n    --hash=sha256:{DIGEST} \\\n    --hash=sha256:{'0' * 64}\n")
    assert bootstrap_pip.locked_pip(lock) == ("26.0", {DIGEST, "0" * 64})
    lock.write_text("pip==26.0\n")
    with pytest.raises(BootstrapError, match="restore it"):
        bootstrap_pip.locked_pip(lock)


def test_the_configured_index_is_asked_with_its_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = tmp_path / "pip.conf"
    with serving(INDEX) as server:
        server.password = "me:se@cret"
        index = server.url.replace("//", "//me:se%40cret@")
        settings.write_text(f"[global]\nindex-url = {index}/simple/\n", encoding="utf-8")
        assert fetched(monkeypatch, PIP_CONFIG_FILE=str(settings)) == CONTENT


def test_other_bytes_under_the_same_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {**INDEX, f"/files/{WHEEL}": CONTENT + b"!"}
    reason = rf"^{WHEEL}: .*\(its sha256 differs\)"
    with serving(pages) as server, pytest.raises(BootstrapError, match=reason):
        fetched(monkeypatch, PIP_INDEX_URL=f"{server.url}/simple")


def test_the_next_source_is_asked_where_one_lacks_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacks = {"/simple/pip/": link("pip-0.1-py3-none-any.whl")}
    with serving(lacks) as first, serving(INDEX) as second:
        settings = {
            "PIP_FIND_LINKS": str(tmp_path),
            "PIP_INDEX_URL": f"{first.url}/simple",
            "PIP_EXTRA_INDEX_URL": f"{second.url}/simple",
        }
        assert fetched(monkeypatch, **settings) == CONTENT
        assert first.asked == ["/simple/pip/"]


def test_the_certificate_that_pip_would_trust_is_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving(INDEX) as server:
        bundle = pose_as("index.example.org", server, tmp_path)
        settings = {"PIP_INDEX_URL": "https://index.example.org/simple", "PIP_PROXY": server.url}
        with pytest.raises(BootstrapError, match="CERTIFICATE_VERIFY_FAILED"):
            fetched(monkeypatch, **settings)
        assert fetched(monkeypatch, **settings, PIP_CERT=str(bundle)) == CONTENT


def test_no_password_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({}) as server:
        index = server.url.replace("//", "//me:secret@")
        reason = re.escape(f"{server.url}/simple/pip/ could not be read (Not Found)")
        with pytest.raises(BootstrapError, match=reason) as refused:
            fetched(monkeypatch, PIP_INDEX_URL=f"{index}/simple")
    assert "secret" not in str(refused.value)


def test_nothing_is_installed_outside_of_an_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert bootstrap_pip.main(["containers/locks/pip.txt"]) == 2
    assert "run containers/venv.sh" in capsys.readouterr().err
