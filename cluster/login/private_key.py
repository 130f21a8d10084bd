"""Private keys: read from a file, and signatures in SSH's encoding (RFC 4253, 5656, 8332)."""

from __future__ import annotations

import base64
import binascii
import re
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

PrivateKey = ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

OPENSSH = re.compile(
    rb"-----BEGIN OPENSSH PRIVATE KEY-----(.*?)-----END OPENSSH PRIVATE KEY-----", re.DOTALL
)
MAGIC = b"openssh-key-v1\0"
RSA_HASHES: dict[str, hashes.HashAlgorithm] = {
    "rsa-sha2-512": hashes.SHA512(),
    "rsa-sha2-256": hashes.SHA256(),
}
CURVE_HASHES: dict[int, hashes.HashAlgorithm] = {
    256: hashes.SHA256(),
    384: hashes.SHA384(),
    521: hashes.SHA512(),
}


class PassphraseMissing(Exception):
    """The file is encrypted."""


def load(data: bytes, passphrase: bytes | None) -> PrivateKey:
    """Return the private key of a file in OpenSSH's format or in PEM.

    Raises:
        PassphraseMissing: it is encrypted, and no passphrase was given.
        ValueError: the passphrase is wrong, or the file holds no key of a current type.
        UnsupportedAlgorithm: of cryptography; it is encrypted in a way that is not known.
    """
    is_openssh = OPENSSH.search(data) is not None
    read = serialization.load_ssh_private_key if is_openssh else serialization.load_pem_private_key
    try:
        key = read(data, passphrase)
    except TypeError:
        if passphrase is None:
            raise PassphraseMissing from None
        raise ValueError("it has no passphrase") from None
    except InvalidTag:
        raise ValueError("the passphrase is wrong") from None
    if not isinstance(key, PrivateKey):
        raise ValueError("it is of a type that is out of use")
    return key


def public_blob(key: PrivateKey) -> bytes:
    """Return the public key in SSH's encoding."""
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return base64.b64decode(line.split()[1])


def readable_blob(data: bytes) -> bytes | None:
    """Return the public key of a file that may be encrypted; None if its format does not tell."""
    found = OPENSSH.search(data)
    if found is None:
        return None
    try:
        body = base64.b64decode(b"".join(found[1].split()), validate=True)
    except binascii.Error:
        return None
    if not body.startswith(MAGIC):
        return None
    rest = body[len(MAGIC) :]
    # Cipher, key derivation and its options; then the number of keys, and the first.
    for _ in range(3):
        rest = rest[4 + int.from_bytes(rest[:4], "big") :]
    size = int.from_bytes(rest[4:8], "big")
    blob = rest[8 : 8 + size]
    return blob if size and len(blob) == size else None


def signature(key: PrivateKey, data: bytes, algorithm: str) -> bytes:
    """Return the signature of `data`.

    Args:
        key: the private key.
        data: what is signed.
        algorithm: such as ssh-ed25519 or, for a key of RSA, rsa-sha2-512.
    """
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return string(algorithm.encode()) + string(key.sign(data))
    if isinstance(key, rsa.RSAPrivateKey):
        signed = key.sign(data, padding.PKCS1v15(), RSA_HASHES[algorithm])
        return string(algorithm.encode()) + string(signed)
    numbers = decode_dss_signature(key.sign(data, ec.ECDSA(CURVE_HASHES[key.key_size])))
    return string(algorithm.encode()) + string(b"".join(map(_integer, numbers)))


def string(data: bytes) -> bytes:
    """Return bytes as SSH sends them, with their length before them."""
    return struct.pack(">I", len(data)) + data


def _integer(number: int) -> bytes:
    # A leading zero bit tells that it is positive.
    return string(number.to_bytes(number.bit_length() // 8 + 1, "big"))
