"""Check who signed an image, and sign one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cluster.plan.apptainer import last_words, need_apptainer
from cluster.plan.image import (
    Image,
    check_bytes,
    lock_sha256,
    manifest_path,
    sha256_of,
    unfinished_manifest_path,
)
from cluster.site.file import load_site, site_of_this_machine
from runfolder.errors import UserError

# Stands for Apptainer's own keyring of PGP keys, instead of a key file.
KEYRING = "keyring"


def check_image(path: Path) -> Image:
    """Return the image, after checking every byte, its lock, and its signature if one is required.

    Raises:
        UserError: the image must not be used.
    """
    image, manifest = check_bytes(path)
    if image.lock_sha256 != lock_sha256(image.variant):
        extra = " EXTRA=FILE, with its extra packages" if image.extra_packages else ""
        raise UserError(
            f"{path}: was built from a different lock (containers/locks) than this checkout's; "
            f"build it again: make build-image VARIANT={image.variant}{extra}"
        )
    if key := os.environ.get("SLUICE_VERIFY_KEY"):
        check_signature(path, key, "SLUICE_VERIFY_KEY", manifest)
    elif key := site_of_this_machine().container.verify_key:
        check_signature(path, key, f"{load_site().source}: container.verify_key", manifest)
    return image


def check_signature(path: Path, key: str, asked: str, manifest: dict[str, Any]) -> None:
    # --local: do not look on a server for a key that is not in the keyring.
    options = ["--local"] if key == KEYRING else ["--key", key]
    check_key(key, asked)
    apptainer = need_apptainer(f"{asked}={key}")
    done = subprocess.run(
        [apptainer, "verify", *options, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        signer = f" by {manifest['signed_by']}" if manifest.get("signed_by") else ""
        raise UserError(
            f"{path}: {asked}={key} does not verify its signature{signer} "
            f"({last_words(done.stderr)}); use the signer's key, or an image from someone you trust"
        )


def check_key(key: str, asked: str) -> None:
    """Check that there is such a public key; `asked` says who names it.

    Raises:
        UserError: there is none.
    """
    if key != KEYRING and not Path(key).is_file():
        raise UserError(f"{asked}={key}: is neither a public key file nor the word '{KEYRING}'")


def sign(path: Path, key: str) -> str:
    """Sign an intact image, with a private key or one of Apptainer's keyring; return by whom.

    An image has one signature, the last.

    The signature is added to a copy, which then replaces the image: whenever this is interrupted,
    the image is the old one or the new one.

    Raises:
        UserError: the image is damaged, or cannot be signed.
    """
    copy, signed = path.with_name(f".{path.name}.unsigned"), unfinished_manifest_path(path)
    apptainer = need_apptainer("sign-image")
    try:
        _finish_signing(path)
        _, manifest = check_bytes(path)
        shutil.copyfile(path, copy)
        shutil.copymode(path, copy)
        _remove_signatures(apptainer, copy)
        _add_signature(apptainer, copy, key)
        manifest["signed_by"] = _signer(key)
        manifest |= {"sha256": sha256_of(copy, size := copy.stat().st_size), "size_bytes": size}
        _write(signed, json.dumps(manifest, indent=2) + "\n")
        copy.rename(path)
        signed.rename(manifest_path(path))
    except OSError as error:
        raise UserError(
            f"{path}: could not be signed: {error.filename}: {error.strerror}; signing needs "
            "space for a second copy in a folder that you can write to"
        ) from None
    finally:
        copy.unlink(missing_ok=True)
    return str(manifest["signed_by"])


def _finish_signing(path: Path) -> None:
    """Install the manifest that an interrupted signing left, if it matches the image."""
    signed = unfinished_manifest_path(path)
    if not signed.exists() or not path.exists():
        return
    content = json.loads(signed.read_text(encoding="utf-8"))
    if content["sha256"] == sha256_of(path, path.stat().st_size):
        signed.rename(manifest_path(path))
    else:
        signed.unlink()


def _remove_signatures(apptainer: str, copy: Path) -> None:
    """Remove other signatures: if there is one from another key, no key verifies the image."""
    command = [apptainer, "sif", "list", str(copy)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(
            f"{copy}: apptainer cannot read it ({last_words(listed.stderr)}); is it an image?"
        )
    columns = [line.split("|") for line in listed.stdout.splitlines()]
    numbers = [row[0].strip() for row in columns if row[-1].startswith("Signature")]
    for number in numbers:
        command = [apptainer, "sif", "del", number, str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"{copy}: its signature {number} cannot be removed ({last_words(done.stderr)}); "
                "sign the image as it was built"
            )


def _add_signature(apptainer: str, copy: Path, key: str) -> None:
    if key == KEYRING:
        # It may ask for a passphrase.
        code, reason = subprocess.call([apptainer, "sign", str(copy)]), "the reason is above"
    else:
        if not Path(key).is_file():
            raise UserError(
                f"KEY={key}: there is no such file; create a key: openssl genpkey -algorithm "
                "ed25519 -out key.pem, or leave KEY out for Apptainer's PGP keyring"
            )
        done = subprocess.run(
            [apptainer, "sign", "--key", key, str(copy)],
            capture_output=True,
            text=True,
            check=False,
        )
        code, reason = done.returncode, last_words(done.stderr)
    if code:
        raise UserError(
            f"KEY={key}: apptainer could not sign with it ({reason}); see `apptainer sign`"
        )


def _signer(key: str) -> str:
    # Only the name of a private key is recorded.
    return "a key of the PGP keyring" if key == KEYRING else f"the key {Path(key).name}"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
