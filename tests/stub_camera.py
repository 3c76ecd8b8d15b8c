"""Cameras in the place of real ones: one within OpenCV, and one of the network that misbehaves when told to."""

import contextlib
import time
from pathlib import Path

import cv2
import numpy as np
from machine import wait_until
from stub_server import Answer, Server

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


def write_video(path: Path, frames: list[np.ndarray], fps: float = 10, codec: str | None = None) -> None:
    """RGB pictures as a video: by a codec of FFmpeg, or by OpenCV's own Motion JPEG."""
    backend = cv2.CAP_ANY if codec else cv2.CAP_OPENCV_MJPEG
    number = cv2.VideoWriter_fourcc(*(codec or "MJPG"))
    writer = cv2.VideoWriter(str(path), backend, number, fps, frames[0].shape[1::-1])
    for image in frames:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()


class Capture:
    """What OpenCV opens: `count` pictures, each once `ready()`, then an end."""

    def __init__(self, count: int, ready=lambda: True, picture=lambda: np.full((40, 60, 3), 30, np.uint8)) -> None:
        self.count, self.ready, self.picture, self.sent, self.released = count, ready, picture, 0, False

    def grab(self) -> bool:
        time.sleep(0.001)
        wait_until(self.ready)
        self.sent += 1
        return self.sent <= self.count

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, self.picture()

    def release(self) -> None:
        self.released = True


class StubCamera:
    """`mode` says what is sent: ok, hang, freeze, garbage, cut, large, grey or mono; `seconds` between pictures."""

    def __init__(self, seconds: float = 0.02, password: str = "") -> None:
        rng = np.random.default_rng(0)
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
        self.sent = self._port = 0
        self.up()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}/live"

    def up(self) -> None:
        """Be reachable, always at the same address."""
        camera = self

        class Pictures(Answer):
            def do_GET(self) -> None:
                if camera.password and "Authorization" not in self.headers:
                    self.reply(401, WWW_Authenticate='Basic realm="camera"')
                    return
                self.send_response(200)
                self.send_header("Content-Type", BOUNDARY)
                self.end_headers()
                with contextlib.suppress(OSError):  # the reader has gone
                    camera.send(self.wfile, self.server)

        self._server = Server(Pictures, self._port)
        self._server.is_up, self._port = True, self._server.server_port

    def down(self) -> None:
        """Be unreachable; connections break off."""
        self._server.is_up = False
        self._server.__exit__()

    def disturb(self, fault: str) -> None:
        """Send what this mode says, or break off connections ("drop"), or be unreachable ("down")."""
        if fault in ("drop", "down"):
            getattr(self, fault)()
        else:
            self.mode = fault

    def recover(self, fault: str) -> None:
        """End it."""
        if fault == "down":
            self.up()
        self.mode = "ok"

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

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
