"""Is this image intact, and built from this checkout's lock? Checked before anything starts in it.

Next to `sluice-cpu.sif` is its manifest `sluice-cpu.json`, which `make build-image` writes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.site import places
from runfolder.errors import UserError, did_you_mean

# The lock files of each variant, in the order in which the build joins them.
LOCKS = {"cpu": ("pip", "torch-cpu", "cpu"), "cuda": ("pip", "cuda")}


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image that matches its manifest."""

    path: Path
    variant: str
    sha256: str
    lock_sha256: str
    extra_packages: dict[str, str] = field(default_factory=dict)
    """Those of EXTRA=, with their versions."""


def images_folder() -> Path:
    """Return the folder of images: $SLUICE_IMAGES, or site.toml's, or `images` in the checkout."""
    return places.folder("images")


def image_path(variant: str) -> Path:
    """Return the path where `make build-image` puts the image of a variant."""
    return images_folder() / f"sluice-{variant}.sif"


def lock_sha256(variant: str) -> str:
    """Return the hash of this checkout's lock for a variant, as an image's manifest has it."""
    digest = hashlib.sha256()
    for name in LOCKS[variant]:
        path = Path("containers/locks") / f"{name}.txt"
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); is the checkout complete?"
            ) from None
    return digest.hexdigest()


def check_bytes(path: Path) -> tuple[Image, dict[str, Any]]:
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
    if sha256_of(path, size) != manifest["sha256"]:
        raise UserError(
            f"{path}: its checksum does not match its manifest {manifest_path(path)}: "
            f"{_damaged(path)}"
        )
    found = Image(
        path=path,
        variant=manifest["variant"],
        sha256=manifest["sha256"],
        lock_sha256=manifest["lock_sha256"],
        extra_packages=manifest["extra_packages"],
    )
    return found, manifest


def _manifest(path: Path) -> dict[str, Any]:
    beside = manifest_path(path)
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
    if isinstance(content, dict):
        # Older ones have none.
        content.setdefault("extra_packages", {})
    kinds = {"variant": str, "sha256": str, "size_bytes": int, "lock_sha256": str}
    kinds |= {"extra_packages": dict}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{beside}: is not an image manifest: no '{key}'; {_remedy(path)}")
    if content["variant"] not in LOCKS:
        raise UserError(
            f"{beside}: variant '{content['variant']}' is unknown"
            + did_you_mean(content["variant"], LOCKS)
        )
    return dict(content)


def sha256_of(path: Path, size: int) -> str:
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


def manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def unfinished_manifest_path(path: Path) -> Path:
    return path.with_suffix(".json.signed")


def _remedy(path: Path) -> str:
    variant = "cuda" if "cuda" in path.name else "cpu"
    return f"build it: make build-image VARIANT={variant}"


def _damaged(path: Path) -> str:
    if unfinished_manifest_path(path).exists():
        return f"signing it was interrupted; finish it: make sign-image IMAGE={path}"
    return f"the file is damaged or not the right one; copy it again, or {_remedy(path)}"
