"""`make sign-image` and `make verify-image` by the real Apptainer, with an image of one file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from cluster.plan.image import lock_sha256
from tests.real.accounts import Account

pytestmark = pytest.mark.needs("unshare", "apptainer")


@pytest.fixture
def tiny(builder: Account, apptainer: str, tmp_path: Path) -> Path:
    """Return an image with its manifest, in a folder of the ordinary user's."""
    folder = builder.home / f"signed images, {tmp_path.name}"
    tree = folder / "tree"
    tree.mkdir(parents=True)
    (tree / "file").write_bytes(b"".join(bytes([number]) * 999 for number in range(256)))
    builder.own(folder)
    file = folder / "sluice-cpu.sif"
    made = builder.run(apptainer, "build", file, tree)
    assert made.returncode == 0, made.stderr
    manifest = {"variant": "cpu", "size_bytes": file.stat().st_size}
    manifest["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["lock_sha256"] = lock_sha256("cpu")
    file.with_suffix(".json").write_text(json.dumps(manifest))
    builder.own(folder)
    return file


def test_an_image_without_a_signature_or_of_another_signer_starts_nothing(
    builder: Account, builder_checkout: Path, tiny: Path, apptainer: str
) -> None:
    keys, runs = tiny.parent / "keys", tiny.parent / "runs"
    keys.mkdir()
    for name in ("ours", "theirs"):
        private, public = keys / f"{name}.pem", keys / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    builder.own(keys)
    settings = {
        "APPTAINER": apptainer,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "SLUICE_RUNS": str(runs),
        "SLUICE_VERIFY_KEY": str(keys / "ours.pub"),
    }

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *words, f"IMAGE={tiny}"]
        return builder.run(*command, cwd=builder_checkout, environment=settings)

    done = make("dry-run")
    assert done.returncode == 2
    assert "does not verify its signature" in done.stderr
    assert make("verify-image").returncode == 2
    theirs = make("sign-image", f"KEY={keys / 'theirs.pem'}")
    assert theirs.returncode == 0, theirs.stderr
    assert "its signature by the key theirs.pem" in make("dry-run").stderr

    done = make("sign-image", f"KEY={keys / 'ours.pem'}")
    assert done.returncode == 0, done.stderr
    done = make("verify-image")
    assert (done.returncode, done.stderr) == (0, "")
    assert "signature verified with" in done.stdout

    # One bit of the packed file, far from any header.
    content = bytearray(tiny.read_bytes())
    content[-1 - len(content) // 4] ^= 1
    tiny.write_bytes(content)
    done = make("dry-run")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2, "the error, and make's own line"
    assert "its checksum does not match its manifest" in done.stderr
    assert not runs.exists()


def test_apptainers_own_keyring_signs_and_verifies(
    builder: Account, builder_checkout: Path, tiny: Path, apptainer: str
) -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *words, f"IMAGE={tiny}", "KEY=keyring"]
        return builder.run(*command, cwd=builder_checkout, environment={"APPTAINER": apptainer})

    assert "does not verify its signature" in make("verify-image").stderr
    who = ["--name", "A", "--email", "a@example.org", "--comment", "tests", "--password", ""]
    made = builder.run(apptainer, "key", "newpair", *who, "--push=false", "--bit-length", "2048")
    assert made.returncode == 0, made.stderr
    signed = make("sign-image")
    assert signed.returncode == 0, signed.stderr
    verified = make("verify-image")
    assert verified.returncode == 0, verified.stderr
