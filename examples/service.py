"""A detector behind HTTP: images are posted as they are, the answer is JSON.

With any other server it is the same: `detector.score` takes io.BytesIO of a request's body (never
the bare bytes, which would be a path). Threads may share one detector.
"""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
from images import stripes
from PIL import Image

import diffad_fast as daf
from diffad_fast.errors import InputError


def answer(detector: daf.Detector, body: bytes) -> dict:
    """What a client is told about an image, the content of a file."""
    found = detector.score(io.BytesIO(body))
    row, column = np.unravel_index(found.map[0].argmax(), found.map[0].shape)
    return {
        "score": round(float(found.score[0]), 2),
        "p_value": round(float(found.p_value[0]), 3),
        # Not known where fewer than 20 normals were held out.
        "anomaly": None if found.label is None else bool(found.label[0]),
        "at": [int(row), int(column)],
    }


def server(detector: daf.Detector, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                status, content = 200, answer(detector, body)
            except InputError as error:  # no image, a damaged or a constant one
                status, content = 422, {"error": str(error)}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    detector = daf.Detector(
        image_size=64, preset="fast", tokens=("energy-16", "spread-2"), train_steps=100, seed=0
    )
    detector.fit(stripes(200, seed=1))
    # The threshold from what the service sees: 3% of false alarms need 33 normals at least.
    detector.recalibrate(stripes(60, seed=4))
    detector.false_positive_rate = 0.03

    with server(detector, port=0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        for broken in (False, True):
            picture = Image.fromarray((stripes(1, 5, broken)[0] * 255).astype(np.uint8))
            file = io.BytesIO()
            picture.save(file, "png")
            print(urlopen(address, file.getvalue()).read().decode())
        try:
            urlopen(address, b"/etc/passwd")
        except HTTPError as error:
            print(error.code, error.read().decode())
        running.shutdown()


if __name__ == "__main__":
    main()
