"""`make verify-image`, `make sign-image`: is this image intact, built from this lock, and signed?

make verify-image VARIANT=cpu KEY=key.pub
python -m cluster image verify images/sluice-cpu.sif --key key.pub
python -m cluster image sign images/sluice-cpu.sif --key key.pem
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import Parser
from cluster.plan.image import LOCKS, check_bytes, image_path, images_folder, lock_sha256
from cluster.plan.signature import KEYRING, check_signature, sign
from runfolder.errors import UserError, did_you_mean


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = Parser(prog="python -m cluster image", allow_abbrev=False)
    parser.add_argument("command", choices=["verify", "sign"])
    parser.add_argument("image", nargs="?", default="", help="default: the one in images/")
    parser.add_argument("--variant", default="", help="cpu or cuda, instead of a path")
    parser.add_argument("--key", default="", help=f"a PEM file, or '{KEYRING}'")
    options = parser.parse_args(argv)
    if options.key.startswith("~"):
        # Not every shell expands the ~ in KEY=~/key.pem.
        options.key = str(Path(options.key).expanduser())
    path = Path(options.image) if options.image else _only_image(options.variant)
    if options.command == "sign":
        print(f"{path}: signed with {sign(path, options.key or KEYRING)}")
        return 0
    image, manifest = check_bytes(path)
    key, asked = options.key, "KEY"
    if not key:
        key, asked = os.environ.get("SLUICE_VERIFY_KEY", ""), "SLUICE_VERIFY_KEY"
    if key:
        check_signature(path, key, asked, manifest)
    trust = f"signature verified with {key}" if key else "signature not checked (KEY= checks it)"
    same = "this" if image.lock_sha256 == lock_sha256(image.variant) else "ANOTHER"
    source = f"from {same} checkout's lock"
    if image.extra_packages:
        source += f", with {len(image.extra_packages)} extra packages"
    print(f"{path}: intact, sha256 {image.sha256[:12]}, {source}; {trust}")
    return 0


def _only_image(variant: str) -> Path:
    if variant:
        if variant not in LOCKS:
            raise UserError(f"VARIANT={variant}: is unknown{did_you_mean(variant, LOCKS)}")
        return image_path(variant)
    there = [image_path(name) for name in LOCKS if image_path(name).exists()]
    if len(there) != 1:
        found = "both variants" if there else "no image"
        raise UserError(f"{images_folder()}: holds {found}; choose one: VARIANT=cpu, or IMAGE=path")
    return there[0]
