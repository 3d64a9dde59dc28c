"""Who made these bytes: Ed25519 signatures of people, and the tag of this machine.

Owns keys and what they prove. Knows neither bundles nor plans: what is signed is bytes.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from thoraxrt.engine.errors import SignatureError

__all__ = ["machine_tag", "machine_tag_matches", "sign", "verify"]

_MACHINE_KEY: Final = "machine.key"
_MACHINE_KEY_BYTES: Final = 32


def sign(data: bytes, key: Path) -> bytes:
    """The 64-byte Ed25519 signature (RFC 8032) of `data` by the private key in the PEM file `key`.

    Raises SignatureError where the file holds no unencrypted Ed25519 private key.
    """
    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise SignatureError(f"the key {key} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it wants a password
        raise SignatureError(
            f"{key} holds no unencrypted private key in PEM; "
            "`openssl genpkey -algorithm ed25519 -out private.pem` makes one"
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise SignatureError(
            f"{key} holds a private key that is not Ed25519; `openssl genpkey -algorithm ed25519 -out private.pem` makes one"
        )
    return private.sign(data)


def verify(data: bytes, signature: bytes, trusted: Sequence[Path]) -> None:
    """Return where one of the trusted keys signed `data`; else raise SignatureError.

    Each of `trusted` is a PEM file with an Ed25519 public key, or a folder whose `*.pem` files are. All
    are read first: one that is no such key is a SignatureError, whatever the others are and signed.
    """
    for key in list(_public_keys(trusted)):  # all, so that no verdict hangs on the order of file names
        try:
            key.verify(signature, data)
        except InvalidSignature:
            continue
        return
    raise SignatureError(f"no key in {', '.join(map(str, trusted)) or 'an empty list'} made this signature")


def _public_keys(trusted: Sequence[Path]) -> Iterator[Ed25519PublicKey]:
    for path in trusted:
        for file in sorted(path.glob("*.pem")) if path.is_dir() else [path]:
            try:
                key = load_pem_public_key(file.read_bytes())
            except OSError as error:
                raise SignatureError(f"the trusted key {file} cannot be read: {error.strerror}") from error
            except (ValueError, UnsupportedAlgorithm):
                key = None
            if not isinstance(key, Ed25519PublicKey):
                raise SignatureError(
                    f"{file} holds no Ed25519 public key in PEM; "
                    "`openssl pkey -in private.pem -pubout -out public.pem` writes it"
                )
            yield key


def machine_tag(data: bytes, folder: Path) -> str:
    """The HMAC-SHA256 (RFC 2104) of `data` in hex, under this machine's key.

    The key is `machine.key` in `folder`: 32 random bytes made at first use, readable by its owner
    only. Raises SignatureError where others may know it or it cannot be made.
    """
    try:
        _make_machine_key(folder)
    except OSError as error:
        raise SignatureError(
            f"{folder / _MACHINE_KEY} cannot be made: {error.strerror}; name another place with THORAXRT_CACHE"
        ) from error
    return hmac.digest(_machine_key(folder), data, "sha256").hex()


def machine_tag_matches(data: bytes, tag: str, folder: Path) -> bool:
    """Whether `tag` is what `machine_tag` gives for `data`, compared in constant time.

    False where there is no key yet. Raises SignatureError where others may know the key.
    """
    if not os.path.lexists(folder / _MACHINE_KEY):
        return False
    expected = hmac.digest(_machine_key(folder), data, "sha256").hex()
    return hmac.compare_digest(expected.encode(), tag.encode(errors="replace"))


def _make_machine_key(folder: Path) -> None:
    """Make the key where there is none: whole or not at all, also where two processes make it at once."""
    path = folder / _MACHINE_KEY
    if os.path.lexists(path):
        return
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f".{_MACHINE_KEY}.{secrets.token_hex(8)}"
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(_MACHINE_KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(made, path)  # exclusive, and never seen half-written
    except FileExistsError:
        return  # another process was first: its key is the machine's
    finally:
        made.unlink()


def _machine_key(folder: Path) -> bytes:
    path = folder / _MACHINE_KEY
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            key = file.read(_MACHINE_KEY_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror}; remove it and it is made anew") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SignatureError(
            f"{path} belongs to another user or is open to others (mode {stat.S_IMODE(status.st_mode):04o}, "
            "expected 0600): others may have signed with it; remove it and what it vouched for is made anew"
        )
    if len(key) != _MACHINE_KEY_BYTES:
        raise SignatureError(f"{path} is no key of {_MACHINE_KEY_BYTES} bytes; remove it and it is made anew")
    return key
