"""One side of `thoraxrt.benchmarks.against`: an engine that answers an image, or a batch, when it is told to.

Run in the Python whose thoraxrt is compared, an older one's too: it uses what has always been there. The first line on
stdin says in JSON what to open; each further one is a round's number and "image" or "batch", and is answered with "done".
"""

import base64
import json
import os
import sys
from collections.abc import Sequence

from thoraxrt.engine.engine import Engine


def _answer(engine: Engine, images: Sequence[bytes]) -> None:
    for answer in engine.predict(images):
        if isinstance(answer, Exception):
            raise answer


if __name__ == "__main__":
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints is no answer
    given = json.loads(sys.stdin.readline())
    files = [base64.b64decode(image) for image in given["images"]]
    batch = [files[i % len(files)] for i in range(given["batch"])]
    one = Engine.open(given["bundle"], **given["options"])
    with one, Engine.open(given["bundle"], batch=len(batch), **given["options"]) as several:
        print("ready", file=said, flush=True)
        for line in sys.stdin:
            number, what = line.split()
            if what == "image":
                _answer(one, [files[int(number) % len(files)]])
            else:
                _answer(several, batch)
            print("done", file=said, flush=True)
