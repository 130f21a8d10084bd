"""Where the training side runs: in the image, when there is one, or on the host in .venv."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.plan import machine
from cluster.plan.apptainer import find_apptainer, no_apptainer
from cluster.plan.image import Image, image_path, lock_sha256
from cluster.plan.signature import check_image
from runfolder import packages
from runfolder.errors import UserError, did_you_mean

RUNTIMES = ("apptainer", "host")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The image and the command to run it with; on the host, neither."""

    image: Image | None = None
    apptainer: str = ""
    why_host: str = "no container"

    def __str__(self) -> str:
        """For messages: in images/sluice-cpu.sif."""
        return f"in {self.image.path}" if self.image else f"on the host, {self.why_host}"

    @property
    def extra_packages(self) -> dict[str, str]:
        """Return the packages of EXTRA= that a run finds there, with their versions."""
        return packages.installed() if self.image is None else self.image.extra_packages

    def record(self) -> dict[str, Any]:
        """Return what run.json says about it."""
        extra = {"extra_packages": self.extra_packages}
        if self.image is None:
            variant = machine.environment_variant()
            lock = lock_sha256(variant) if variant else None
            return {"runtime": "host", "image": None, "lock_sha256": lock, **extra}
        return {
            "runtime": "apptainer",
            "image": {"path": str(self.image.path.absolute()), "sha256": self.image.sha256},
            "lock_sha256": self.image.lock_sha256,
            **extra,
        }


def choose_runtime(runtime: str, image: str, variants: Sequence[str]) -> Runtime:
    """Return where to run: in `image`, in the first of `variants` that exists, or on the host.

    On the host, its environment is completed. If `runtime` is empty, an image decides.

    Raises:
        UserError: what was asked for does not exist, or the image must not be used.
    """
    if runtime not in ("", *RUNTIMES):
        raise UserError(f"RUNTIME={runtime}: is unknown{did_you_mean(runtime, RUNTIMES)}")
    if runtime == "host":
        return _host("no container")
    places = [Path(image)] if image else [image_path(variant) for variant in variants]
    path = next((place for place in places if place.exists()), None)
    if path is None and (image or runtime == "apptainer"):
        raise UserError(
            f"{f'IMAGE={image}' if image else 'RUNTIME=apptainer'}: there is no {places[0]}; "
            f"build it: make build-image VARIANT={variants[0]}, or use RUNTIME=host"
        )
    if path is None:
        return _host("no container")
    apptainer = find_apptainer()
    if apptainer is None and runtime == "apptainer":
        raise UserError(f"RUNTIME=apptainer: {no_apptainer()}")
    if apptainer is None:
        return _host(f"not in {path}: {no_apptainer()}")
    return Runtime(image=check_image(path), apptainer=apptainer)


def _host(why: str) -> Runtime:
    machine.complete_environment()
    return Runtime(why_host=why)


def variants(*, gpus: bool, strict: bool) -> list[str]:
    """Return the usable variants of the image, best first; `strict`: no CPU variant with GPUs."""
    if gpus:
        return ["cuda"] if strict else ["cuda", "cpu"]
    return ["cpu", "cuda"]


def runtime_values(runtime: Runtime) -> dict[str, str]:
    """Return what launch.env says about a runtime."""
    image = runtime.image
    return {
        "image": str(image.path.absolute()) if image else "",
        "image_sha256": image.sha256 if image else "",
        "apptainer": runtime.apptainer,
        "host_python": "" if image else sys.executable,
    }
