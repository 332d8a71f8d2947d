"""Who vouches for a bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from runtime import seal, signature
from runtime.bundle import SHIPPED, SIGNATURE, differences, open_bundle
from runtime.errors import BundleError, BundleTampered
from runtime.signature import sign


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Private and public key, as OpenSSL writes them."""
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    key = Ed25519PrivateKey.generate()
    none = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none))
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return private, public


def check(bundle: Path, trusted: list[Path]) -> Path:
    return signature.check((bundle / "manifest.json").read_bytes(), bundle / SIGNATURE, trusted)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(SHIPPED, tmp_path / "bundle")


def test_a_signature_holds_for_its_key_alone(copy: Path, tmp_path: Path):
    (mine, public), (_, other) = keys(tmp_path, "mine"), keys(tmp_path, "other")
    with pytest.raises(BundleError, match="not signed"):
        check(copy, [public])
    sign(copy, mine)
    assert check(copy, [other, public]) == public
    assert open_bundle(copy).name == "phantom-unet"
    with pytest.raises(BundleTampered, match=r"manifest.sig: not of .*other.pem"):
        check(copy, [other])


def test_whatever_changes_the_bundle_ends_the_signature(copy: Path, tmp_path: Path):
    private, public = keys(tmp_path, "mine")
    sign(copy, private)
    signed = (copy / SIGNATURE).read_bytes()
    seal.add(copy, {"scores.json": "{}"})
    with pytest.raises(BundleError, match="not signed"):
        check(copy, [public])
    (copy / SIGNATURE).write_bytes(signed)
    with pytest.raises(BundleTampered, match="or the bundle has changed since"):
        check(copy, [public])


def test_what_is_checked_is_what_is_parsed(copy: Path, tmp_path: Path, monkeypatch):
    """The manifest is read once: no other can take its place in between."""
    private, public = keys(tmp_path, "mine")
    sign(copy, private)
    read: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or real(path))
    assert open_bundle(copy, [public]).name == "phantom-unet"
    assert read.count(copy / "manifest.json") == 1
    with pytest.raises(BundleTampered):
        open_bundle(copy, [keys(tmp_path, "other")[1]])


def test_keys_of_openssl_are_read(copy: Path, tmp_path: Path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    private, public = tmp_path / "k.pem", tmp_path / "p.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    sign(copy, private)
    assert check(copy, [public]) == public


def test_what_is_no_key_is_refused_by_name(copy: Path, tmp_path: Path):
    private, public = keys(tmp_path, "mine")
    (tmp_path / "text").write_text("hello")
    elliptic = ec.generate_private_key(ec.SECP256R1())
    none = serialization.NoEncryption()
    (tmp_path / "ec").write_bytes(
        elliptic.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none)
    )
    for path, message in (
        ("nowhere", "No such file"),
        ("text", "no Ed25519 private key"),
        ("ec", "another algorithm"),
        (public, "no Ed25519 private"),
    ):
        with pytest.raises(BundleError, match=message):
            sign(copy, tmp_path / path)
    sign(copy, private)
    with pytest.raises(BundleError, match="text: no Ed25519 public key"):
        check(copy, [tmp_path / "text"])


def test_two_bundles_differ_in_what_their_manifests_say(copy: Path):
    assert differences(open_bundle(), open_bundle(copy)) == []
    seal.add(
        copy,
        {},
        version="9",
        minimum_volume_ml=json.loads((copy / "manifest.json").read_text())["minimum_volume_ml"] | {"subdural": 2},
    )
    found = differences(open_bundle(), open_bundle(copy))
    assert {"entry": "minimum_volume_ml.subdural", "first": "0.5", "second": "2.0"} in found
    assert {one["entry"] for one in found} == {"minimum_volume_ml.subdural", "version"}
