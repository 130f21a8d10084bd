"""image.py: what is refused, and why; with files that only look like images, and stand-ins."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.commands.image import main
from cluster.plan.apptainer import find_apptainer, need_apptainer
from cluster.plan.image import image_path, lock_sha256
from cluster.plan.signature import KEYRING, check_image, sign
from runfolder.errors import UserError
from tests.fast import command

# Signs by adding a line, and accepts a file that ends with the key's name.
APPTAINER = """#!/bin/sh
for last; do :; done
case "$1 $2" in
"sign --key") echo "signed by $(basename "$3" .pem)" >> "$last" ;;
"sif list") echo "ID |TYPE" ;;
"verify --key")
  [ "$(tail -n 1 "$last")" = "signed by $(basename "$3" .pub)" ] && exit 0
  echo 'FATAL:   signature not found' >&2
  exit 255 ;;
"verify --local") exit 0 ;;
*) echo "FATAL:   $*" >&2; exit 255 ;;
esac
"""


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout with locks, an Apptainer on the PATH, and no image."""
    root = tmp_path / "checkout"
    (root / "containers/locks").mkdir(parents=True)
    for name in ("pip", "torch-cpu", "cpu", "cuda"):
        (root / f"containers/locks/{name}.txt").write_text(f"{name}==1\n")
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(APPTAINER)
    program.chmod(0o755)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("APPTAINER", "APPTAINER_PREFIX", "SLUICE_IMAGES", "SLUICE_VERIFY_KEY"):
        monkeypatch.delenv(name, raising=False)
    return root


def make(variant: str = "cpu", content: bytes = b"an image\n", **changes: object) -> Path:
    path = image_path(variant)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    manifest = {
        "image": path.name,
        "variant": variant,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "lock_sha256": lock_sha256(variant),
        "built": "with other keys",
    }
    path.with_suffix(".json").write_text(json.dumps(manifest | changes))
    return path


def test_an_image_that_is_whole_is_what_its_manifest_says() -> None:
    found = check_image(make("cuda"))
    assert (found.path, found.variant) == (Path("images/sluice-cuda.sif"), "cuda")
    assert found.sha256 == hashlib.sha256(b"an image\n").hexdigest()
    assert found.lock_sha256 == hashlib.sha256(b"pip==1\ncuda==1\n").hexdigest()


def test_the_hash_of_the_lock_is_that_of_its_files_joined() -> None:
    joined = b"pip==1\ntorch-cpu==1\ncpu==1\n"
    assert lock_sha256("cpu") == hashlib.sha256(joined).hexdigest()


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_flipped_bit_is_found(content: bytes, data: st.DataObject) -> None:
    path = make(content=content)
    check_image(path)
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="its checksum does not match its manifest"):
        check_image(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size_bytes": 7}, "has 9 bytes, but its manifest says 7: the file is damaged"),
        ({"lock_sha256": "0" * 64}, r"a different lock .* make build-image VARIANT=cpu"),
        ({"lock_sha256": "0", "extra_packages": {"trl": "1"}}, "VARIANT=cpu EXTRA=FILE, with its"),
        ({"variant": "cdua"}, "variant 'cdua' is unknown; did you mean 'cuda'"),
        ({"sha256": None}, "is not an image manifest: no 'sha256'"),
        ({"extra_packages": ["trl"]}, "is not an image manifest: no 'extra_packages'"),
    ],
)
def test_what_does_not_fit_is_said_with_the_remedy(changes: dict[str, Any], said: str) -> None:
    path = make()
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | changes))
    with pytest.raises(UserError, match=said):
        check_image(path)


def test_a_missing_or_unreadable_file_is_said() -> None:
    with pytest.raises(UserError, match="there is no such image; build it: make build-image"):
        check_image(Path("images/sluice-cpu.sif"))
    path = make()
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        check_image(path)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(UserError, match="is not an image manifest"):
        check_image(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"its manifest images/sluice-cpu.json is missing; copy it"):
        check_image(path)


# ---- signatures ----


@pytest.fixture
def keys(checkout: Path) -> Path:
    folder = checkout / "keys"
    folder.mkdir()
    for name in ("ours.pem", "ours.pub", "theirs.pub"):
        (folder / name).touch()
    return folder


def test_signing_keeps_the_image_whole_and_a_key_that_is_demanded_must_vouch(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    monkeypatch.setenv("SLUICE_VERIFY_KEY", str(keys / "ours.pub"))
    with pytest.raises(UserError, match=r"does not verify its signature \(signature not found\)"):
        check_image(path)
    assert sign(path, str(keys / "ours.pem")) == "the key ours.pem"
    assert check_image(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert (manifest["signed_by"], manifest["built"]) == ("the key ours.pem", "with other keys")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        *("sluice-cpu.json", "sluice-cpu.sif")
    ]
    monkeypatch.setenv("SLUICE_VERIFY_KEY", str(keys / "theirs.pub"))
    with pytest.raises(UserError, match=r"does not verify its signature by the key ours.pem \("):
        check_image(path)
    monkeypatch.setenv("SLUICE_VERIFY_KEY", KEYRING)
    check_image(path)
    monkeypatch.setenv("SLUICE_VERIFY_KEY", str(keys / "none.pub"))
    with pytest.raises(UserError, match="neither a public key file nor the word 'keyring'"):
        check_image(path)


def test_what_is_damaged_is_not_signed_and_a_refused_key_changes_nothing(keys: Path) -> None:
    path = make(size_bytes=1)
    with pytest.raises(UserError, match="damaged"):
        sign(path, str(keys / "ours.pem"))
    path = make()
    with pytest.raises(UserError, match=r"KEY=nowhere: there is no such file; create a key"):
        sign(path, "nowhere")
    with pytest.raises(UserError, match=r"KEY=keyring: apptainer could not sign"):
        sign(path, KEYRING)
    check_image(path)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("renames", [0, 1])
def test_an_interrupted_signing_leaves_the_image_usable_or_says_how_to_finish(
    keys: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    path = make()
    done = []
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sign(path, str(keys / "ours.pem"))
    monkeypatch.undo()
    monkeypatch.chdir(keys.parent)
    monkeypatch.setenv("APPTAINER", str(keys.parents[1] / "bin/apptainer"))
    if renames:
        with pytest.raises(UserError, match=r"interrupted; finish it: make sign-image IMAGE="):
            check_image(path)
    else:
        check_image(path)
    sign(path, str(keys / "ours.pem"))
    check_image(path)
    assert len(list(path.parent.iterdir())) == 2


# ---- the command ----


def test_verify_and_sign_say_one_line(keys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def image(*words: str) -> subprocess.CompletedProcess[str]:
        folder, environment = keys.parent, dict(os.environ)
        return command.call(main, *words, folder=folder, environment=environment, capfd=capfd)

    none = image("verify")
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("error: images: holds no image; choose one: ")
    make()
    done = image("verify")
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    assert "signature not checked" in done.stdout
    refused = image("verify", "--key", str(keys / "ours.pub"))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert image("sign", "--variant", "cpu", "--key", str(keys / "ours.pem")).returncode == 0
    done = image("verify", "--key", str(keys / "ours.pub"))
    assert done.stdout.endswith(f"signature verified with {keys / 'ours.pub'}\n")
    make("cuda")
    assert "both variants" in image("sign").stderr
    assert "VARIANT=cdua: is unknown; did you mean 'cuda'?" in (
        image("verify", "--variant", "cdua").stderr
    )


def test_apptainer_is_the_one_that_is_named_then_the_paths_then_a_private_copy(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = checkout.parent / "bin/apptainer"
    assert find_apptainer() == str(ours)
    monkeypatch.setenv("APPTAINER", str(checkout / "none"))
    with pytest.raises(UserError, match="is not a command"):
        find_apptainer()
    monkeypatch.delenv("APPTAINER")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_apptainer() is None
    (checkout / ".apptainer/bin").mkdir(parents=True)
    (checkout / ".apptainer/bin/apptainer").symlink_to(ours)
    assert find_apptainer() == str(checkout / ".apptainer/bin/apptainer")
    monkeypatch.setenv("APPTAINER_PREFIX", "elsewhere")
    with pytest.raises(UserError, match=r"elsewhere/bin/apptainer; containers/install-apptainer"):
        need_apptainer("sign-image")
