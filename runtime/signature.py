"""Who vouches for a bundle: Ed25519 (RFC 8032) over its manifest, which holds the SHA-256 of all its other files."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from runtime.bundle import SIGNATURE
from runtime.errors import BundleError, BundleTampered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Key = TypeVar("Key", Ed25519PrivateKey, Ed25519PublicKey)


def sign(folder: Path, key: Path) -> None:
    """Write ``manifest.sig``.

    Parameters
    ----------
    key : Ed25519 private key, PEM without a password (``openssl genpkey -algorithm ed25519``)

    Raises
    ------
    BundleError : no such key

    """
    private = _read(key, lambda data: load_pem_private_key(data, password=None), Ed25519PrivateKey, "private")
    (folder / SIGNATURE).write_bytes(private.sign((folder / "manifest.json").read_bytes()))


def check(manifest: bytes, signature: Path, keys: Sequence[Path]) -> Path:
    """The key among `keys` that signed these very bytes.

    Parameters
    ----------
    manifest : what ``manifest.json`` holds, as it is going to be parsed
    signature : path of ``manifest.sig``
    keys : Ed25519 public keys, PEM

    Raises
    ------
    BundleError : not signed, or a key that can't be read
    BundleTampered : signed by someone else, or changed since

    """
    publics = [(key, _read(key, load_pem_public_key, Ed25519PublicKey, "public")) for key in keys]
    try:
        signed = signature.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{signature}: {error.strerror}: not signed, but must be: `scanside bundle sign` the bundle"
        ) from None
    for key, public in publics:
        try:
            public.verify(signed, manifest)
        except InvalidSignature:
            continue
        return key
    names = ", ".join(str(key) for key in keys)
    raise BundleTampered(f"{signature}: not of {names}, or the bundle has changed since it was signed")


def _read(path: Path, load: Callable[[bytes], object], kind: type[Key], what: str) -> Key:
    try:
        key = load(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}: name an Ed25519 {what} key in PEM") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BundleError(f"{path}: no Ed25519 {what} key in PEM without a password: {error}") from None
    if not isinstance(key, kind):
        raise BundleError(f"{path}: a key of another algorithm: name an Ed25519 {what} key")
    return key
