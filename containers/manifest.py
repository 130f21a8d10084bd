"""Describe an image as JSON:  python containers/manifest.py IMAGE --labels FILE --packages FILE ...

The commands that start jobs compare the image with it, so that a damaged file, or one from another
lock, is found before a job waits in the queue.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path


def main() -> None:
    """Print the manifest."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("image", type=Path)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--apptainer", required=True)
    options = parser.parse_args()
    labels = json.loads(options.labels.read_text())["data"]["attributes"]["labels"]
    with options.image.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = {
        "image": options.image.name,
        "variant": labels["sluice.variant"],
        "sha256": digest,
        "size_bytes": options.image.stat().st_size,
        "lock_sha256": labels["sluice.lock.sha256"],
        "packages_sha256": hashlib.sha256(options.packages.read_bytes()).hexdigest(),
        "versions": _named(labels, "sluice.version."),
        "extra_packages": _named(labels, "sluice.extra."),
        "git_commit": labels["org.opencontainers.image.revision"],
        "base": {"name": options.base, "digest": labels["org.opencontainers.image.base.digest"]},
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "apptainer": options.apptainer,
    }
    print(json.dumps(manifest, indent=2))


def _named(labels: dict[str, str], prefix: str) -> dict[str, str]:
    """Return the labels that begin with `prefix`, without it."""
    return {
        label.removeprefix(prefix): value
        for label, value in sorted(labels.items())
        if label.startswith(prefix)
    }


if __name__ == "__main__":
    main()
