"""Signatures and the machine's tag: what they prove, and every way in which they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from thoraxrt.engine.errors import SignatureError
from thoraxrt.engine.trust import machine_tag, machine_tag_matches, sign, verify


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another's public key."""
    path = tmp_path_factory.mktemp("stranger") / "stranger.pem"
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def test_a_signature_by_a_trusted_key(keys: tuple[Path, Path], stranger: Path, tmp_path: Path) -> None:
    private, public = keys
    signature = sign(b"data", private)
    assert len(signature) == 64
    verify(b"data", signature, [public])
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (trusted / "a.pem").write_bytes(stranger.read_bytes())
    (trusted / "b.pem").write_bytes(public.read_bytes())
    (trusted / "README").write_text("no key, and not taken for one")
    verify(b"data", signature, [trusted])
    verify(b"data", signature, [stranger, public])


@given(data=st.binary(max_size=100), position=st.integers(0, 63), bit=st.integers(0, 7))
def test_any_other_data_or_signature_is_refused(keys: tuple[Path, Path], data: bytes, position: int, bit: int) -> None:
    private, public = keys
    signature = sign(data, private)
    with pytest.raises(SignatureError, match=r"no key in .*public\.pem made this signature"):
        verify(data + b"x", signature, [public])
    flipped = bytearray(signature)
    flipped[position] ^= 1 << bit
    with pytest.raises(SignatureError, match="made this signature"):
        verify(data, bytes(flipped), [public])


def test_a_stranger_no_key_and_an_odd_length_are_refused(
    keys: tuple[Path, Path], stranger: Path, tmp_path: Path
) -> None:
    private, public = keys
    signature = sign(b"data", private)
    (tmp_path / "empty").mkdir()
    for trusted in ([stranger], [tmp_path / "empty"], []):
        with pytest.raises(SignatureError, match="made this signature"):
            verify(b"data", signature, trusted)
    for wrong in (b"", signature[:-1], signature + b"x"):
        with pytest.raises(SignatureError, match="made this signature"):
            verify(b"data", wrong, [public])


def _x25519(encryption: BestAvailableEncryption | NoEncryption = NoEncryption()) -> bytes:  # noqa: B008 - immutable
    return x25519.X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def _encrypted() -> bytes:
    private = ed25519.Ed25519PrivateKey.generate()
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))


@pytest.mark.parametrize("content", [bytes, lambda: b"-----BEGIN", _x25519, _encrypted])
def test_files_that_are_no_key(content: Callable[[], bytes], tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(content())
    with pytest.raises(SignatureError, match=r"key\.pem holds .*openssl genpkey"):
        sign(b"data", file)
    with pytest.raises(SignatureError, match=r"key\.pem holds no Ed25519 public key.*openssl pkey"):
        verify(b"data", bytes(64), [file])


def test_a_private_key_is_not_trusted_by_mistake(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    with pytest.raises(SignatureError, match="holds no Ed25519 public key"):
        verify(b"data", sign(b"data", private), [private])
    with pytest.raises(SignatureError, match="holds no unencrypted private key"):
        sign(b"data", public)
    with pytest.raises(SignatureError, match="cannot be read: No such file"):
        sign(b"data", tmp_path / "nowhere.pem")
    with pytest.raises(SignatureError, match="cannot be read: No such file"):
        verify(b"data", bytes(64), [tmp_path / "nowhere.pem"])


@pytest.mark.parametrize("name", ["0private.pem", "zprivate.pem"])
def test_one_file_that_is_no_public_key_spoils_a_trusted_folder_whatever_its_name(
    name: str, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    (tmp_path / "a.pem").write_bytes(public.read_bytes())
    (tmp_path / name).write_bytes(private.read_bytes())
    for trusted in ([tmp_path], [public, tmp_path / name]):
        with pytest.raises(SignatureError, match=f"{name} holds no Ed25519 public key"):
            verify(b"data", sign(b"data", private), trusted)


def test_the_machines_tag(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    assert not machine_tag_matches(b"data", "", here)  # no key yet, and none is made to say so
    assert not here.exists()
    tag = machine_tag(b"data", here)
    assert tag == machine_tag(b"data", here)
    assert [(p.name, p.stat().st_mode & 0o777, p.stat().st_size) for p in here.iterdir()] == [
        ("machine.key", 0o600, 32)
    ]
    assert machine_tag_matches(b"data", tag, here)
    assert not machine_tag_matches(b"date", tag, here)
    assert not machine_tag_matches(b"data", "\udcff" + tag[1:], here)  # what JSON may hold
    assert machine_tag(b"data", elsewhere) != tag
    assert not machine_tag_matches(b"data", tag, elsewhere)


def _symlink(key: Path) -> None:
    key.rename(key.with_name("other"))
    key.symlink_to("other")


def _fifo(key: Path) -> None:
    key.unlink()
    os.mkfifo(key, 0o600)


def _foreign(key: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(key, 12345, 12345)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda key: key.chmod(0o640), "mode 0640, expected 0600"),
        (lambda key: key.write_bytes(b"short"), "no key of 32 bytes"),
        (lambda key: key.write_bytes(bytes(33)), "no key of 32 bytes"),
        (_symlink, "cannot be read"),
        (_fifo, "no key of 32 bytes"),
        (_foreign, "belongs to another user"),
    ],
)
def test_a_machine_key_that_others_may_know_or_that_is_none(
    spoil: Callable[[Path], None], complaint: str, tmp_path: Path
) -> None:
    tag = machine_tag(b"data", tmp_path)
    spoil(tmp_path / "machine.key")
    with pytest.raises(SignatureError, match=complaint):
        machine_tag(b"data", tmp_path)
    with pytest.raises(SignatureError, match=complaint):
        machine_tag_matches(b"data", tag, tmp_path)


def test_processes_that_start_together_agree_on_the_key(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from thoraxrt.engine.trust import machine_tag\n"
        "sys.stdin.read(); print(machine_tag(b'data', Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdin
        process.stdin.close()
    tags = set()
    for process in processes:
        assert process.stdout
        tags.add(process.stdout.read())
        process.stdout.close()
        assert process.wait() == 0
    assert len(tags) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["machine.key"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SignatureError, match=r"machine\.key cannot be made: "):
        machine_tag(b"data", tmp_path / "file")
