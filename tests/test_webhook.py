"""--webhook: one POST for each alarm, whatever the server does, and no frame waits for it."""

import base64
import contextlib
import errno
import json
import threading
import time

import numpy as np
import pytest
from machine import wait_until
from PIL import Image
from stub_model import RedModel
from stub_server import Answer, Server

from prediction import webhook
from prediction.options import PredictionSettings
from prediction.run import predict
from prediction.table import Table
from prediction.webhook import Webhook, parse
from utils.errors import InputError

SECRET = "Gr3nzw@ll"


class Recorder(Answer):
    def do_POST(self) -> None:
        server = self.server
        server.headers.append((self.path, dict(self.headers)))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = server.answers.pop(0) if server.answers else 200
        if callable(answer):
            answer(self)
            return
        if answer == 200:
            server.got.append(body["frame"])
            server.bodies.append(body)
        self.reply(answer, Location="/elsewhere")


class Hook(Server):
    """Answers POSTs as `answers` say, one by one, then with 200; an answer is a code or a function of the handler."""

    def __init__(self, *answers) -> None:
        self.answers, self.got, self.bodies, self.headers = list(answers), [], [], []
        super().__init__(Recorder)


@pytest.fixture(autouse=True)
def in_short(monkeypatch):
    """Limits that a test can wait for."""
    monkeypatch.setattr(webhook, "SHORTEST_PAUSE", 0.05)
    monkeypatch.setattr(webhook, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(webhook, "CLOSE_SECONDS", 1.0)


def alarm(number: int) -> dict:
    return {"source": "belt.mp4", "frame": number, "score": 2.5}


def babble(handler) -> None:
    handler.wfile.write(b"no HTTP\r\n\r\n")


def hang(_) -> None:
    time.sleep(1)


def drip(handler) -> None:
    """The beginning of an answer, then a byte now and then, each before the limit of a read."""
    handler.wfile.write(b"HTTP/1.1 2")
    with contextlib.suppress(OSError):  # the other side has had enough
        while True:
            handler.wfile.write(b"0")
            time.sleep(0.1)


@pytest.mark.parametrize(
    "answers",
    [[], [500, 503, 429], [babble, babble], [hang], [drip], [lambda handler: handler.connection.close()]],
    ids=["well", "busy", "babbling", "slow", "dripping", "broken off"],
)
def test_alarms_arrive_once_and_in_order(answers, capsys):
    with Hook(*answers) as server:
        hook = Webhook(f"{server.url}/hook")
        start = time.perf_counter()
        for number in range(5):
            hook.send(alarm(number))
        assert time.perf_counter() - start < 0.1
        wait_until(lambda: len(server.got) == 5)
        hook.close()
    assert server.got == list(range(5)) and (hook.sent, hook.given_up) == (5, 0)
    assert len(capsys.readouterr().err.splitlines()) == (2 if answers else 0)


def test_many_alarms_leave_no_threads(monkeypatch):
    monkeypatch.setattr(webhook, "ANSWER_SECONDS", 60.0)
    with Hook() as server:
        hook = Webhook(f"{server.url}/hook")
        for number in range(20):
            hook.send(alarm(number))
        wait_until(lambda: hook.sent == 20)
        hook.close()
        assert sum(isinstance(thread, threading.Timer) for thread in threading.enumerate()) < 5


@pytest.mark.parametrize("code", [302, 307, 400, 404])
def test_a_refused_alarm_is_told_and_the_next_is_sent(code, capsys):
    with Hook(code) as server:
        hook = Webhook(f"{server.url}/hook")
        hook.send(alarm(1))
        hook.send(alarm(2))
        hook.close()
    assert server.got == [2] and (hook.sent, hook.given_up) == (1, 1)
    assert f"the alarm of belt.mp4 #1 is given up: the server answers {code}" in capsys.readouterr().err


def test_a_server_that_is_down_costs_alarms_that_are_counted_and_no_time(monkeypatch, capsys):
    monkeypatch.setattr(webhook, "MOST_WAITING", 10)
    with Hook() as server:
        address = f"{server.url}/hook"
    hook = Webhook(address)
    hook.send(alarm(0))
    wait_until(hook._waiting.empty)  # it is being tried
    start = time.perf_counter()
    for number in range(1, 16):
        hook.send(alarm(number))
    assert time.perf_counter() - start < 0.5
    assert hook.given_up == 5
    hook.close()
    assert (hook.sent, hook.given_up) == (0, 16)
    hook._thread.join(5)
    told = capsys.readouterr().err
    assert (told.count("alarms wait"), told.count("10 others wait")) == (1, 5)
    assert "11 alarm(s) given up, for the run has ended" in told


def test_a_proxy_that_is_no_address(monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", "http://proxy..local:80")
    monkeypatch.delenv("no_proxy", raising=False)
    hook = Webhook("http://host.invalid/hook")
    hook.send(alarm(1))
    hook.close()
    assert hook.given_up == 1 and "does not answer (" in (told := capsys.readouterr().err)
    assert "label" in told  # as Python's codec says it, in words of its version


def test_the_password_is_sent_and_never_shown(capsys):
    with Hook(404) as server:
        hook = Webhook(f"http://mine:Gr3nzw%40ll@{server.host}/{SECRET}?token={SECRET}")
        hook.send(alarm(1))
        hook.close()
    ((path, headers),) = server.headers
    assert path == f"/{SECRET}?token={SECRET}" and headers["Content-Type"] == "application/json"
    assert base64.b64decode(headers["Authorization"].split()[1]).decode() == f"mine:{SECRET}"
    told = capsys.readouterr().err
    assert hook.name in told and not any(text in told + hook.name for text in ("Gr3nzw", "mine"))


ENDLESS = f"http://{'a' * 64}.local/"


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://host/x", "host/x", "http://", "http://host:x/", "http://host/a b", "http://煤/"),
        *("http://server..local/hook", ENDLESS),
    ],
)
def test_other_addresses_are_refused(url):
    with pytest.raises(InputError, match="--webhook"):
        parse(url)


def test_each_change_to_an_alarm_is_sent_with_its_row(tmp_path, capsys):
    for index, red in enumerate([0, 1, 1, 0, 0, 1, 0, 1, 1, 1]):
        image = np.full((12, 16, 3), (250 * red, 30, 30), np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / f"{index}.png")
    with Hook(503) as server:
        sources, address = (str(tmp_path / "in"),), f"{server.url}/hook?key={SECRET}"
        settings = PredictionSettings(
            sources, tmp_path / "out", smooth=2, overlays=None, json_lines=True, webhook=address
        )
        predict(settings, RedModel, None, {"webhook": address})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert server.bodies == [lines[2], lines[8]]  # of 10 frames, with two in a row for an alarm
    text = (tmp_path / "out/config.json").read_text()
    config = json.loads(text)
    assert config["webhook"] == {"sent": 2, "given_up": 0} and SECRET not in text
    assert config["settings"]["webhook"] == server.url


def test_the_alarm_goes_out_where_the_row_finds_no_room(tmp_path, monkeypatch):
    def full(table, values):
        raise OSError(errno.ENOSPC, "No space left on device", "predictions.csv")

    monkeypatch.setattr(Table, "add", full)
    Image.new("RGB", (16, 12), (250, 30, 30)).save(tmp_path / "red.png")
    with Hook() as server:
        settings = PredictionSettings((str(tmp_path / "red.png"),), tmp_path / "out", webhook=f"{server.url}/hook")
        with pytest.raises(OSError, match="No space left"):
            predict(settings, RedModel, None, {})
    assert server.got == [0]
