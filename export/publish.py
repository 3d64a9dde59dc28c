"""How a bundle appears on disk: whole, under its name, or not at all.

Owns the temporary folders beside a bundle, their locks, the exchange, and the signature and receipt that may
join a bundle later. Knows nothing of what a bundle holds beyond its manifest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from thoraxrt.engine.bundle import MANIFEST, SIGNATURE, Bundle
from thoraxrt.engine.errors import BundleError
from thoraxrt.engine.receipt import RECEIPT, RECEIPT_SIGNATURE
from thoraxrt.engine.trust import sign

__all__ = ["publish", "refuse_to_overwrite", "sign_bundle", "write_receipt"]

_UNFINISHED: Final = ".unfinished"
# linux/fs.h, fcntl.h
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100


def refuse_to_overwrite(out: Path, replace: bool, mark: str = MANIFEST) -> None:
    """Raise BundleError where `out` exists, unless it holds the file `mark` and `replace` is set."""
    if not out.exists():
        return
    if not replace:
        raise BundleError(f"{out} exists; give another place, or --replace to exchange it for the new one")
    if not (out / mark).is_file():
        raise BundleError(f"{out} exists and is no bundle or model of ours (it has no {mark}); it is not replaced")


def publish(files: dict[str, bytes], out: Path, *, replace: bool, mark: str = MANIFEST) -> None:
    """Write the files beside `out`, then let the whole folder appear under its name at once.

    `files` are contents by path in the folder; `mark` is the one that a folder to be replaced must hold.

    A writer killed at any moment leaves `out` as it was or as it should be, and perhaps a hidden
    folder beside it, which the next one to succeed removes. Where `out` is a symbolic link, what it
    points to is written. Raises BundleError where `out` exists (see `refuse_to_overwrite`) or cannot
    be written.
    """
    out = out.resolve()
    made: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with _folder(out.parent) as parent:
                _lock(parent, fcntl.LOCK_SH)  # until the new folder is locked, nobody may take it for a dead one
                made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_UNFINISHED, dir=out.parent))
                _lock(held.enter_context(_folder(made)), fcntl.LOCK_SH)
            for name, data in files.items():
                _write(made / name, data)
            for folder in {made, *((made / name).parent for name in files)}:
                folder.chmod(0o755)
                with _folder(folder) as descriptor:
                    os.fsync(descriptor)
            _appear(made, out, replace, mark)
    except OSError as error:
        raise BundleError(
            f"{out} cannot be written: {error.strerror}; what was there is untouched"
            + ("; this file system cannot exchange folders: remove it first" if error.errno == errno.EINVAL else "")
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)  # the old bundle after an exchange, else what is left of a failure
    _remove_unfinished(out)


def sign_bundle(bundle: Bundle, key: Path) -> None:
    """Write `manifest.sig`: the 64-byte Ed25519 signature of `manifest.json`, instead of one that is there.

    Every file is compared with the manifest first. Raises BundleError where one differs or the bundle
    cannot be written, SignatureError where `key` is no private key.
    """
    bundle.verify()
    path, manifest = bundle.path / SIGNATURE, (bundle.path / MANIFEST).read_bytes()
    if hashlib.sha256(manifest).hexdigest() != bundle.sha256:
        raise BundleError(f"{bundle.path / MANIFEST} changed while it was read; sign the bundle again")
    _replace(path, sign(manifest, key))


def write_receipt(bundle: Bundle, receipt: bytes, key: Path | None = None) -> None:
    """Write `parity.json` beside the bundle's files, and `parity.sig` where a private key is given.

    A receipt that is there is replaced, its signature removed before: at no moment does a signature stand beside a
    receipt that it does not belong to. Raises BundleError where the bundle cannot be written, SignatureError where
    `key` is no private key.
    """
    signature = None if key is None else sign(receipt, key)
    try:
        (bundle.path / RECEIPT_SIGNATURE).unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(f"{bundle.path / RECEIPT_SIGNATURE} cannot be removed: {error.strerror}") from error
    _replace(bundle.path / RECEIPT, receipt)
    if signature is not None:
        _replace(bundle.path / RECEIPT_SIGNATURE, signature)


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, instead of one that is there. Raises BundleError."""
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write(made, data)
        made.replace(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        made.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o444)  # a bundle is immutable


def _appear(made: Path, out: Path, replace: bool, mark: str) -> None:
    try:
        made.rename(out)  # never onto a folder that holds something
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        refuse_to_overwrite(out, replace, mark)  # again: another export may have been faster
        _exchange(made, out)


def _exchange(made: Path, out: Path) -> None:
    """renameat2(2): Python has no binding for its atomic exchange. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(made), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _remove_unfinished(out: Path) -> None:
    """Remove what killed writers of `out` left: the folders that no living one holds a lock on."""
    with contextlib.suppress(OSError), _folder(out.parent) as parent:
        fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in out.parent.iterdir():
            if path.name.startswith(f".{out.name}.") and path.name.endswith(_UNFINISHED):
                with contextlib.suppress(OSError), _folder(path) as descriptor:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> None:
    """Lock a folder; where the file system has no locks, dead writers' folders are not removed either."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, kind)
