"""A network camera that misbehaves when told to: motion JPEG over HTTP on this machine."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time

import cv2
import numpy as np

POOL = 40  # pictures that are sent in turn
COLOR = (150, 60, 20)  # RGB, the mean of every picture
BOUNDARY = "multipart/x-mixed-replace; boundary=frame"


def jpeg(image: np.ndarray) -> bytes:
    """An RGB or grey picture as a JPEG file."""
    return cv2.imencode(".jpg", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def pictures(rng: np.random.Generator, size: tuple[int, int]) -> list[np.ndarray]:
    """Noise around COLOR, RGB uint8 [height, width, 3]."""
    noise = rng.integers(-20, 21, (POOL, *size, 3))
    return [(np.array(COLOR) + values).astype(np.uint8) for values in noise]


class StubCamera:
    """`mode` says what is sent: ok, hang, freeze, garbage, cut, large, grey or mono; `seconds` between pictures."""

    def __init__(self, seconds: float = 0.02, seed: int = 0, password: str = "") -> None:
        rng = np.random.default_rng(seed)
        colored = pictures(rng, (48, 64))
        files = [jpeg(image) for image in colored]
        self.files = {
            "ok": files,
            "freeze": files[:1],
            "garbage": [rng.bytes(2000) for _ in files],
            "cut": [file[:200] for file in files],  # before any pixel, which some decoders would be content with
            "large": [jpeg(image) for image in pictures(rng, (96, 160))],
            "grey": [jpeg(np.repeat(image[..., :1], 3, 2)) for image in colored],
            "mono": [jpeg(image[..., 0]) for image in colored],
        }
        self.mode, self.seconds, self.password = "ok", seconds, password
        self.sent = self.connections = 0
        self._server: http.server.ThreadingHTTPServer | None = None
        self._port = 0
        self.up()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}/live"

    def up(self) -> None:
        """Be reachable, always at the same address."""
        camera = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.connections += 1
                if camera.password and "Authorization" not in self.headers:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("Content-Type", BOUNDARY)
                self.end_headers()
                with contextlib.suppress(OSError):  # the reader has gone
                    camera.send(self.wfile, self.server)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = self._server.is_up = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Be unreachable; connections break off."""
        self._server.is_up = False
        self._server.shutdown()
        self._server.server_close()

    def drop(self) -> None:
        """Break off all connections, and take new ones at once."""
        self.down()
        self.up()

    def send(self, stream, server) -> None:
        """Pictures until the connection is broken off."""
        while server.is_up:
            if self.mode != "hang":
                file = self.files[self.mode][self.sent % len(self.files[self.mode])]
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(file)}\r\n\r\n"
                stream.write(head.encode() + file + b"\r\n")
                self.sent += 1
            time.sleep(self.seconds)

    def __enter__(self) -> StubCamera:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
