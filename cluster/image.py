"""Is this image whole, of this checkout's lock, and signed? Asked before anything starts in it.

    make verify-image VARIANT=cpu KEY=key.pub
    python -m cluster.image verify images/sluice-cpu.sif --key key.pub
    python -m cluster.image sign images/sluice-cpu.sif --key key.pem

Beside `sluice-cpu.sif` lies its manifest `sluice-cpu.json`, which `make build-image` writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import site
from cluster.errors import Parser, run_to_exit
from runfolder.errors import UserError, did_you_mean

# What each variant is made of, in the order in which the build joins the files.
LOCKS = {"cpu": ("pip", "torch-cpu", "cpu"), "cuda": ("pip", "cuda")}
# The key that is none: Apptainer's own ring of PGP keys.
KEYRING = "keyring"


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image that was found to be what its manifest says."""

    path: Path
    variant: str
    sha256: str
    lock_sha256: str


def images_folder() -> Path:
    """Return the folder of images: $SLUICE_IMAGES, or site.toml's, or `images` in the checkout."""
    return site.folder("images")


def named(variant: str) -> Path:
    """Return the place of the image of a variant, where `make build-image` puts it."""
    return images_folder() / f"sluice-{variant}.sif"


def find_apptainer() -> str | None:
    """Return the command: $APPTAINER, site.toml's, that on the PATH, or a private copy; or None.

    Raises:
        UserError: $APPTAINER or site.toml names none.
    """
    given = os.environ.get("APPTAINER")
    if not given and (sites := site.of_this_machine().container.apptainer):
        if shutil.which(sites) is None:
            raise UserError(f"{site.load().source}: container.apptainer: {sites} is not a command")
        return sites
    found = shutil.which(given or "apptainer")
    if given and found is None:
        raise UserError(f"APPTAINER={given}: is not a command; name one, or unset it")
    found = found or shutil.which(str(_private_apptainer()))
    # It is called from other folders.
    return str(Path(found).absolute()) if found else None


def need_apptainer(why: str) -> str:
    """Return the command, or raise a `UserError` that says how to get it."""
    found = find_apptainer()
    if found is None:
        raise UserError(f"{why}: {no_apptainer()}")
    return found


def no_apptainer() -> str:
    """Return why there is no Apptainer and what to do."""
    return (
        f"there is no apptainer, neither on the PATH nor at {_private_apptainer()}; "
        "containers/install-apptainer.sh installs one"
    )


def _private_apptainer() -> Path:
    return Path(os.environ.get("APPTAINER_PREFIX") or ".apptainer").absolute() / "bin/apptainer"


def lock_sha256(variant: str) -> str:
    """Return the hash of this checkout's lock for a variant, as an image's manifest has it."""
    digest = hashlib.sha256()
    for name in LOCKS[variant]:
        path = Path("containers/locks") / f"{name}.txt"
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); is the checkout whole?"
            ) from None
    return digest.hexdigest()


# ---- is it whole? ---------------------------------------------------------------------------


def check(path: Path) -> Image:
    """Return what `path` is, after a look at every byte, its lock, and its signature if one is due.

    Raises:
        UserError: it must not be used.
    """
    image, manifest = _check_bytes(path)
    if image.lock_sha256 != lock_sha256(image.variant):
        raise UserError(
            f"{path}: was built from another lock (containers/locks) than this checkout's; build "
            f"it anew: make build-image VARIANT={image.variant}"
        )
    if key := os.environ.get("SLUICE_VERIFY_KEY"):
        _check_signature(path, key, "SLUICE_VERIFY_KEY", manifest)
    elif key := site.of_this_machine().container.verify_key:
        _check_signature(path, key, f"{site.load().source}: container.verify_key", manifest)
    return image


def _check_bytes(path: Path) -> tuple[Image, dict[str, Any]]:
    manifest = _manifest(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {_remedy(path)}") from None
    if size != manifest["size_bytes"]:
        raise UserError(
            f"{path}: has {size:,} bytes, but its manifest says {manifest['size_bytes']:,}: "
            f"{_damaged(path)}"
        )
    if _sha256(path, size) != manifest["sha256"]:
        raise UserError(
            f"{path}: its bytes are not those of its manifest {_manifest_path(path)}: "
            f"{_damaged(path)}"
        )
    variant, lock = manifest["variant"], manifest["lock_sha256"]
    return Image(path=path, variant=variant, sha256=manifest["sha256"], lock_sha256=lock), manifest


def _manifest(path: Path) -> dict[str, Any]:
    beside = _manifest_path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such image; {_remedy(path)}")
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: its manifest {beside} is missing; copy it there, or {_remedy(path)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{beside}: cannot be read: {error}; {_remedy(path)}") from None
    kinds = {"variant": str, "sha256": str, "size_bytes": int, "lock_sha256": str}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{beside}: is not an image's manifest: no '{key}'; {_remedy(path)}")
    if content["variant"] not in LOCKS:
        raise UserError(
            f"{beside}: variant '{content['variant']}' is unknown"
            + did_you_mean(content["variant"], LOCKS)
        )
    return dict(content)


def _sha256(path: Path, size: int) -> str:
    def say() -> None:
        print(f"checking {path} ({size / 1e9:.1f} GB)", file=sys.stderr)

    # A large image on a slow disk takes a while; a small one says nothing.
    patience = threading.Timer(1.0, say)
    patience.daemon = True
    if sys.stderr.isatty():
        patience.start()
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {_remedy(path)}") from None
    finally:
        patience.cancel()


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _unfinished_manifest(path: Path) -> Path:
    return path.with_suffix(".json.signed")


def _remedy(path: Path) -> str:
    variant = "cuda" if "cuda" in path.name else "cpu"
    return f"build it: make build-image VARIANT={variant}"


def _damaged(path: Path) -> str:
    if _unfinished_manifest(path).exists():
        return f"signing it was interrupted; finish it: make sign-image IMAGE={path}"
    return f"the file is damaged or another; copy it again, or {_remedy(path)}"


# ---- is it signed? --------------------------------------------------------------------------


def _check_signature(path: Path, key: str, asked: str, manifest: dict[str, Any]) -> None:
    # --local: a key that is not on the ring is not looked for on a server.
    options = ["--local"] if key == KEYRING else ["--key", key]
    if key != KEYRING and not Path(key).is_file():
        raise UserError(
            f"{asked}={key}: is neither the file of a public key nor the word '{KEYRING}'"
        )
    apptainer = need_apptainer(f"{asked}={key}")
    done = subprocess.run(
        [apptainer, "verify", *options, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        signer = f", which {manifest['signed_by']} signed" if manifest.get("signed_by") else ""
        raise UserError(
            f"{path}: {asked}={key} does not vouch for it{signer} ({_last_words(done.stderr)}); "
            "take the key of who signed it, or an image from whom you trust"
        )


def _last_words(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith(("FATAL", "ERROR"))]
    return lines[-1].partition(":")[2].strip() if lines else "apptainer gives no reason"


def sign(path: Path, key: str) -> str:
    """Sign an image that is whole, with a private key or one of Apptainer's ring; return by whom.

    An image bears one signature, the last.

    The signature is added to a copy, which then takes the image's place: whenever this is
    interrupted, the image is the old one or the new one.

    Raises:
        UserError: it is not whole, or cannot be signed.
    """
    copy, signed = path.with_name(f".{path.name}.unsigned"), _unfinished_manifest(path)
    apptainer = need_apptainer("sign-image")
    try:
        _finish_signing(path)
        _, manifest = _check_bytes(path)
        shutil.copyfile(path, copy)
        shutil.copymode(path, copy)
        _remove_signatures(apptainer, copy)
        _add_signature(apptainer, copy, key)
        manifest["signed_by"] = _signer(key)
        manifest |= {"sha256": _sha256(copy, size := copy.stat().st_size), "size_bytes": size}
        _write(signed, json.dumps(manifest, indent=2) + "\n")
        copy.rename(path)
        signed.rename(_manifest_path(path))
    except OSError as error:
        raise UserError(
            f"{path}: could not be signed: {error.filename}: {error.strerror}; it needs room for "
            "a second copy in a folder that you can write"
        ) from None
    finally:
        copy.unlink(missing_ok=True)
    return str(manifest["signed_by"])


def _finish_signing(path: Path) -> None:
    """Put in place the manifest that an interrupted signing left, if it is the image's."""
    signed = _unfinished_manifest(path)
    if not signed.exists() or not path.exists():
        return
    content = json.loads(signed.read_text(encoding="utf-8"))
    if content["sha256"] == _sha256(path, path.stat().st_size):
        signed.rename(_manifest_path(path))
    else:
        signed.unlink()


def _remove_signatures(apptainer: str, copy: Path) -> None:
    """Take off the signatures of others: with one that it does not know, a key vouches for none."""
    command = [apptainer, "sif", "list", str(copy)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(
            f"{copy}: apptainer cannot read it ({_last_words(listed.stderr)}); is it an image?"
        )
    columns = [line.split("|") for line in listed.stdout.splitlines()]
    numbers = [row[0].strip() for row in columns if row[-1].startswith("Signature")]
    for number in numbers:
        command = [apptainer, "sif", "del", number, str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"{copy}: its signature {number} cannot be removed ({_last_words(done.stderr)}); "
                "sign the image as it was built"
            )


def _add_signature(apptainer: str, copy: Path, key: str) -> None:
    if key == KEYRING:
        # It may ask for a passphrase.
        code, reason = subprocess.call([apptainer, "sign", str(copy)]), "the reason is above"
    else:
        if not Path(key).is_file():
            raise UserError(
                f"KEY={key}: there is no such file; make a key: openssl genpkey -algorithm ed25519 "
                "-out key.pem, or leave KEY out for Apptainer's PGP keyring"
            )
        done = subprocess.run(
            [apptainer, "sign", "--key", key, str(copy)],
            capture_output=True,
            text=True,
            check=False,
        )
        code, reason = done.returncode, _last_words(done.stderr)
    if code:
        raise UserError(f"KEY={key}: apptainer could not sign with it ({reason}); see its `sign`")


def _signer(key: str) -> str:
    # Of a private key only the name is recorded.
    return "a key of the PGP keyring" if key == KEYRING else f"the key {Path(key).name}"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


# ---- the command ----------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = Parser(prog="python -m cluster.image", allow_abbrev=False)
    parser.add_argument("command", choices=["verify", "sign"])
    parser.add_argument("image", nargs="?", default="", help="default: the one in images/")
    parser.add_argument("--variant", default="", help="cpu or cuda, instead of a path")
    parser.add_argument("--key", default="", help=f"a PEM file, or '{KEYRING}'")
    options = parser.parse_args(argv)
    if options.key.startswith("~"):
        # Not every shell sees a path in KEY=~/key.pem.
        options.key = str(Path(options.key).expanduser())
    path = Path(options.image) if options.image else _only_image(options.variant)
    if options.command == "sign":
        print(f"{path}: signed with {sign(path, options.key or KEYRING)}")
        return 0
    image, manifest = _check_bytes(path)
    key, asked = options.key, "KEY"
    if not key:
        key, asked = os.environ.get("SLUICE_VERIFY_KEY", ""), "SLUICE_VERIFY_KEY"
    if key:
        _check_signature(path, key, asked, manifest)
    trust = f"signed, {key} vouches for it" if key else "signature not looked at (KEY= does)"
    same = "this" if image.lock_sha256 == lock_sha256(image.variant) else "ANOTHER"
    print(f"{path}: whole, sha256 {image.sha256[:12]}, of {same} checkout's lock; {trust}")
    return 0


def _only_image(variant: str) -> Path:
    if variant:
        if variant not in LOCKS:
            raise UserError(f"VARIANT={variant}: there is none{did_you_mean(variant, LOCKS)}")
        return named(variant)
    there = [named(name) for name in LOCKS if named(name).exists()]
    if len(there) != 1:
        found = "both variants" if there else "no image"
        raise UserError(f"{images_folder()}: holds {found}; say which: VARIANT=cpu, or IMAGE=path")
    return there[0]


if __name__ == "__main__":
    run_to_exit(main)
