"""The digest that a container registry has for a tag:  python containers/registry.py REFERENCE

Prints the reference with the digest, such as docker.io/library/debian@sha256:..., so that the
recorded image is the one built from. Asks without a password; give a private image by its digest.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request

# Seconds; a person waits for the answer.
TIMEOUT_S = 4
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


class Unreachable(Exception):
    """The registry gave no answer, or no useful one; the text says why."""


def split(reference: str) -> tuple[str, str, str]:
    """Return registry, repository and tag or digest of a reference, with Docker's defaults."""
    name, at, digest = reference.partition("@")
    head, slash, rest = name.partition("/")
    # Docker's own rule for what is a host and what is an owner on Docker Hub.
    if slash and ("." in head or ":" in head or head == "localhost"):
        registry, path = head, rest
    else:
        registry, path = "docker.io", name if slash else f"library/{name}"
    path, _, tag = path.partition(":")
    return registry, path, digest if at else tag or "latest"


NAME = r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?"


def resolve(reference: str) -> str:
    """Return `reference` with a digest instead of a tag.

    Raises:
        Unreachable: the registry does not answer, or has no such image.
    """
    if not re.fullmatch(NAME, reference):
        raise Unreachable(f"{reference} is not a name such as registry/owner/image:tag")
    registry, path, tag = split(reference)
    api = f"{_address(registry)}/v2"
    if tag.startswith("sha256:"):
        _ask(f"{api}/", {}, accept_refusal=True)
        return f"{registry}/{path}@{tag}"
    headers = {"Accept": ", ".join(MANIFESTS)}
    url = f"{api}/{path}/manifests/{tag}"
    answer = _ask(url, headers, accept_refusal=True)
    if challenge := answer.get("WWW-Authenticate"):
        headers["Authorization"] = f"Bearer {_token(challenge)}"
        answer = _ask(url, headers)
    digest = answer.get("Docker-Content-Digest", "")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise Unreachable(f"{registry} gives no digest for {path}:{tag}")
    return f"{registry}/{path}@{digest}"


def _address(registry: str) -> str:
    host = "registry-1.docker.io" if registry == "docker.io" else registry
    # As Docker does: a registry on this very machine needs no certificate.
    local = host.partition(":")[0] in ("localhost", "127.0.0.1")
    return f"{'http' if local else 'https'}://{host}"


def _ask(url: str, headers: dict[str, str], *, accept_refusal: bool = False) -> dict[str, str]:
    request = urllib.request.Request(url, headers=headers, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return dict(answer.headers)
    except urllib.error.HTTPError as error:
        if accept_refusal and error.code == 401:
            return dict(error.headers)
        raise Unreachable(f"{url} answers {error.code} {error.reason}") from None
    except OSError as error:
        raise Unreachable(f"{url} cannot be reached ({getattr(error, 'reason', error)})") from None


def _token(challenge: str) -> str:
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if "realm" not in fields:
        raise Unreachable(f"a password is required ({challenge}); give the image by its digest")
    query = urllib.parse.urlencode({k: fields[k] for k in ("service", "scope") if k in fields})
    try:
        with urllib.request.urlopen(f"{fields['realm']}?{query}", timeout=TIMEOUT_S) as answer:
            content = json.load(answer)
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"{fields['realm']} gives no token ({error}); give the image by its digest"
        ) from None
    return str(content.get("token") or content["access_token"])


if __name__ == "__main__":
    try:
        print(resolve(sys.argv[1]))
    except Unreachable as reason:
        sys.exit(str(reason))
