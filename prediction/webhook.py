"""Alarms to a server: one POST for each, from a thread of its own, so that no server delays a frame."""

import base64
import contextlib
import http.client
import json
import queue
import socket
import threading
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit

from utils.command_line import warn
from utils.errors import InputError

MOST_WAITING = 1000  # alarms; then the oldest is given up
ANSWER_SECONDS = 10.0
SHORTEST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts; each is twice the one before
CLOSE_SECONDS = 10.0  # for the alarms that still wait when the run ends
BUSY = (408, 425, 429)  # answers below 500 that ask for another attempt


class Webhook:
    """Sends alarms in order. Each is tried until the server takes or refuses it, or too many wait behind it."""

    def __init__(self, url: str) -> None:
        """Raises InputError unless `url` is an address of http or https."""
        self._request, self.name = parse(url)
        self.sent = self.given_up = 0
        self._accepted = 0
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._counting = threading.Lock()  # alarms are given up in both threads
        self._opener = urllib.request.build_opener(NoRedirect, Http, Https)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, alarm: dict[str, Any]) -> None:
        """Queue an alarm, given as the values of its row."""
        self._accepted += 1
        if self._waiting.qsize() >= MOST_WAITING:
            self._give_up(self._waiting.get(), f"{MOST_WAITING} others wait")
        self._waiting.put(alarm)

    def close(self) -> None:
        """Leave the waiting alarms some time, then give them up."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        self._ended.set()
        if left := self._accepted - self.sent - self.given_up:
            self.given_up += left
            warn(f"{self.name}: {left} alarm(s) given up, for the run has ended; their rows are in the table")

    def _work(self) -> None:
        while (alarm := self._waiting.get()) and not self._ended.is_set():
            self._deliver(alarm)

    def _deliver(self, alarm: dict[str, Any]) -> None:
        pause = SHORTEST_PAUSE
        while problem := self._post(alarm):
            why, is_final = problem
            if is_final:
                self._give_up(alarm, why)
                return
            if pause == SHORTEST_PAUSE:
                warn(f"{self.name}: {why}; alarms wait")
            if self._ended.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE)
        self.sent += 1
        if pause > SHORTEST_PAUSE:
            warn(f"{self.name}: alarms are taken again")

    def _post(self, alarm: dict[str, Any]) -> tuple[str, bool] | None:
        """One attempt; returns what went wrong, and whether another is of no use."""
        try:
            with self._opener.open(self._request, json.dumps(alarm).encode(), ANSWER_SECONDS):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            return f"the server answers {error.code}", error.code < 500 and error.code not in BUSY
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no host that a proxy could have
            reason = getattr(error, "reason", error)
            return f"the server does not answer ({str(reason) or type(reason).__name__})", False

    def _give_up(self, alarm: dict[str, Any], why: str) -> None:
        with self._counting:
            self.given_up += 1
        warn(f"{self.name}: the alarm of {alarm['source']} #{alarm['frame']} is given up: {why}")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following one would turn the POST into a GET, and the alarm would be lost in silence."""

    def redirect_request(self, *_: object) -> None:
        """No other request: the answer counts as an error."""


class Limited:
    """Connections are cut ANSWER_SECONDS after the request: who drips bytes stays below the limit of each read."""

    def do_open(self, kind: type, request: urllib.request.Request, **options: Any) -> http.client.HTTPResponse:
        class Connection(kind):
            def getresponse(self) -> http.client.HTTPResponse:
                timer = threading.Timer(ANSWER_SECONDS, cut, [self.sock])
                timer.daemon = True
                timer.start()
                try:
                    return super().getresponse()
                finally:
                    timer.cancel()

        return super().do_open(Connection, request, **options)


class Http(Limited, urllib.request.HTTPHandler):
    pass


class Https(Limited, urllib.request.HTTPSHandler):
    pass


def cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed
        connected.shutdown(socket.SHUT_RDWR)


def parse(url: str) -> tuple[urllib.request.Request, str]:
    """The request to a server, and its name without user, password and path, which may be a secret, too."""
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")  # as the connection will do: no empty and no endless labels
    except ValueError:
        is_usable = False
    if not is_usable or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError("--webhook takes an address that begins with http:// or https://, in ASCII without spaces")
    host = parts.netloc.rpartition("@")[2]
    headers = {"Content-Type": "application/json"}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    address = parts._replace(netloc=host, fragment="").geturl()
    return urllib.request.Request(address, headers=headers, method="POST"), f"{parts.scheme}://{host}"
