"""A bundle's default backend and precision, from its receipts: the fastest of those that passed the parity check.

Owns the choice, and the bundle that states it. Measures nothing: `thoraxrt parity` and `thoraxrt bench` have.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from thoraxrt.benchmarks.bench import BenchResult
from thoraxrt.engine.bundle import MANIFEST, SIGNATURE, Bundle, Recommended
from thoraxrt.engine.errors import BundleError, RequestError
from thoraxrt.engine.receipt import RECEIPT, RECEIPT_SIGNATURE, read_receipt, require_parity
from thoraxrt.engine.trust import sign
from thoraxrt.export.bundle import manifest_bytes
from thoraxrt.export.publish import publish

__all__ = ["recommend"]


def recommend(bundle: Bundle, speed: BenchResult, key: Path | None = None) -> Recommended:
    """Exchange the bundle for one whose manifest recommends the fastest backend and precision that passed, and say which.

    Fastest is what ran the network alone, an image at a time, in the fewest milliseconds in `speed`, of the same bundle
    on the machine that is to serve. Graphs and verdicts stay as they are; the receipt names the new manifest. `key` is a
    private key that signs both, as it must where they were signed.

    Raises BundleError where there is no receipt, it is of another manifest or of hardly anything (see
    `require_parity`), RequestError where `speed` is of another
    bundle or timed nothing that passed, and where a signature would be lost.
    """
    receipt = read_receipt(bundle)
    if receipt is None:
        raise BundleError(f"{bundle.path} has no {RECEIPT}; `thoraxrt parity BUNDLE --data FOLDER --write` writes it")
    if speed.bundle_sha256 != bundle.sha256:
        raise RequestError(
            f"the times are of the manifest {speed.bundle_sha256[:12]}, this one is {bundle.sha256[:12]}; "
            "run thoraxrt bench on this bundle"
        )
    signatures = {MANIFEST: SIGNATURE, RECEIPT: RECEIPT_SIGNATURE}
    if key is None and (lost := [name for name in signatures.values() if (bundle.path / name).exists()]):
        raise RequestError(f"{' and '.join(lost)} would no longer hold; give the key that is to sign the new ones")
    passed = {f"{backend} {precision}": (backend, precision) for backend, precision in receipt.candidates}
    timed = {peer.name: peer.speed_up for peer in speed.peers if peer.name in passed and peer.speed_up is not None}
    if not timed:
        raise RequestError(
            f"none of {', '.join(passed) or 'nothing'}, which passed the parity check, was timed; "
            "run thoraxrt bench without --no-peers and --quick on the machine that is to serve"
        )
    backend, precision = passed[max(timed, key=lambda name: timed[name])]
    require_parity(bundle, backend, precision)
    recommended = Recommended(backend=backend, precision=precision)
    bundle.verify()
    files = {path.name: path.read_bytes() for path in bundle.path.iterdir() if path.is_file()}
    files[MANIFEST] = manifest_bytes(msgspec.structs.replace(bundle.manifest, recommended=recommended))
    named = hashlib.sha256(files[MANIFEST]).hexdigest()
    files[RECEIPT] = files[RECEIPT].replace(bundle.sha256.encode(), named.encode())
    if key is not None:
        files |= {signature: sign(files[name], key) for name, signature in signatures.items()}
    publish(files, bundle.path, replace=True)
    return recommended
