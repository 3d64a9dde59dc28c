"""Other servers of the same ONNX graph: `python benchmarks/serving_peers.py grpc|pytriton|litserve MODEL SPEC PORT`.

The scenario of each: an encoded radiograph in, logits out, decoded and resized by the same code as thoraxrt's, up to
eight at once through ONNX Runtime as it comes. None draws boxes, limits its queue or shields its decoder. SPEC is a
manifest's preprocessing, as JSON. Run by `thoraxrt.benchmarks.serving`, in the Python that has the peer installed and
with this repository on its path.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime

from thoraxrt.engine.decode import decode
from thoraxrt.engine.preprocess import PreprocessSpec, network_input

_BATCH = 8
_WAIT_S = 0.002  # LitServe's workers poll without a pause where it is 0, for most of two CPUs


class Network:
    """Encoded radiographs to logits, in two steps."""

    def __init__(self, model: str, spec: str) -> None:
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._spec = msgspec.json.decode(spec, type=PreprocessSpec)
        self._pool = ThreadPoolExecutor()

    def image(self, data: bytes) -> Any:
        """uint8 `(1, S, S)`."""
        return network_input(decode(data).pixels, self._spec)

    def images(self, files: Sequence[bytes]) -> list[Any]:
        """The same for several, in threads."""
        return list(self._pool.map(self.image, files))

    def logits(self, images: Sequence[Any]) -> Any:
        """float32 `(N, C)`."""
        return self._session.run(["logits"], {"image": np.stack(images)})[0]


def _grpc(network: Network, port: int) -> None:
    import grpc

    waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
    one, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor()

    async def batches() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < _BATCH and not waiting.empty():
                batch.append(waiting.get_nowait())
            images = [image for image, _ in batch]
            logits = await asyncio.get_running_loop().run_in_executor(one, network.logits, images)
            for (_, answer), row in zip(batch, logits, strict=True):
                if not answer.done():  # its client has given up
                    answer.set_result(row)

    async def predict(data: bytes, context: Any) -> bytes:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        await waiting.put((await loop.run_in_executor(decoders, network.image, data), answer))
        return bytes((await answer).tobytes())

    async def serve() -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        methods: Any = {"Predict": grpc.unary_unary_rpc_method_handler(predict)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Peer", methods),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await batches()

    asyncio.run(serve())


_LOCK = """import multiprocessing.resource_tracker, threading
multiprocessing.resource_tracker._resource_tracker._lock = threading._PyRLock()


"""


def _pytriton(network: Network, port: int) -> None:
    import pytriton  # type: ignore[import-not-found]
    from pytriton.decorators import batch  # type: ignore[import-not-found]
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor  # type: ignore[import-not-found]
    from pytriton.triton import Triton, TritonConfig  # type: ignore[import-not-found]

    # What runs its backend is an older interpreter on this one's library, which since 3.11.7 wants more of a lock.
    data = Path(str(pytriton.__file__)).parent / "proxy" / "data.py"
    if _LOCK not in (source := data.read_text()):
        data.write_text(source.replace("class _Popen(", _LOCK + "class _Popen(", 1))

    @batch  # type: ignore[untyped-decorator]
    def infer(image_bytes: Any) -> dict[str, Any]:  # bytes (N, 1)
        return {"logits": network.logits(network.images([row[0] for row in image_bytes]))}

    ports = {"grpc_port": port, "http_port": port + 1, "metrics_port": port + 2}
    with Triton(config=TritonConfig(**ports, log_verbose=0)) as triton:
        triton.bind(
            "chest",
            infer,
            inputs=[Tensor(name="image_bytes", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="logits", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(max_batch_size=_BATCH, batcher=DynamicBatcher()),
        )
        triton.run()
        threading.Event().wait()


if sys.argv[1:2] == ["litserve"]:  # whose workers import this file, with these arguments
    import litserve  # type: ignore[import-not-found]
    from fastapi import UploadFile  # type: ignore[import-not-found]

    class Api(litserve.LitAPI):  # type: ignore[misc]
        """LitServe's steps."""

        def setup(self, device: Any) -> None:
            """Open the network, in the worker."""
            self.network = Network(*sys.argv[2:4])

        def decode_request(self, request: Any, **_: Any) -> Any:
            """The uploaded file."""
            return request.file.read()

        def batch(self, inputs: Any) -> Any:
            """Decode them."""
            return self.network.images(inputs)

        def predict(self, x: Any, **_: Any) -> Any:
            """Logits."""
            return self.network.logits(x)

        def unbatch(self, output: Any) -> Any:
            """One row each."""
            return list(output)

        def encode_response(self, output: Any, **_: Any) -> Any:
            """As JSON."""
            return {"logits": output.tolist()}

    Api.decode_request.__annotations__["request"] = UploadFile  # which LitServe reads as it is


def _litserve(port: int) -> None:
    server = litserve.LitServer(Api(max_batch_size=_BATCH, batch_timeout=_WAIT_S), accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    kind, model, spec, port = sys.argv[1:]
    if kind == "litserve":
        _litserve(int(port))
    else:
        {"grpc": _grpc, "pytriton": _pytriton}[kind](Network(model, spec), int(port))
