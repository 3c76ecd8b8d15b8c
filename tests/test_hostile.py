"""Files from strangers: a few hundred of the fuzzers' cases, and those that once found something.

The long campaign, in processes of its own, is tests/hardness/run.py.
"""

import csv
import io
import os
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import tarfile
import zlib
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import png_chunk
from PIL import Image

from datasets.coalad import extract
from datasets.images import read_picture
from reporting.report import templates
from utils.errors import InputError, UnreadableError
from utils.safe_text import safe_cell

if sys.platform != "linux":
    pytest.skip("the watch over memory and time is Linux's", allow_module_level=True)

from hardness import fuzzing

CASES = {"weights (.pth)": 25, "weights (.safetensors)": 25, "published tensors": 400, "published k-means": 150}
KINDS = [
    *("checkpoints", "operating points", "published tensors", "published k-means", "weights (.pth)"),
    *("weights (.safetensors)", "archives", "images", "masks"),
]


@pytest.fixture(scope="module")
def targets(trained, tmp_path_factory):
    return fuzzing.targets(tmp_path_factory.mktemp("corpus"), trained / "models" / "belt")


@pytest.fixture(scope="module")
def watch():
    return fuzzing.Watch()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_refused_or_harmless(targets, watch, tmp_path, kind):
    target, rng = targets[kind], random.Random(kind)
    for _ in range(CASES.get(kind, 60)):
        seed = rng.choice(target.seeds)
        data = rng.choice(target.mutations)(rng, seed.read_bytes())
        assert fuzzing.try_case(watch, target, seed, data, tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_files_are_taken(targets, watch, tmp_path, kind):
    """If they were refused, every mutation would be refused, too, and nothing would be tested."""
    target = targets[kind]
    for seed in target.seeds:
        assert fuzzing.try_case(watch, target, seed, seed.read_bytes(), tmp_path) == []
        target.read(seed)


def test_the_watch_sees(watch, tmp_path):
    (tmp_path / "inside").mkdir()

    def connect():
        with socket.socket() as client:
            client.settimeout(0.1)
            client.connect_ex(("127.0.0.1", 9))

    acts = {
        "socket.connect": connect,
        "subprocess.Popen": lambda: subprocess.run(["true"]),
        "os.system": lambda: os.system("true"),
        "open": lambda: (tmp_path / "x").write_text("x"),
        "os.rename": lambda: (tmp_path / "x").rename(tmp_path / "y"),
        "os.remove": (tmp_path / "y").unlink,
        "pickle.find_class": lambda: pickle.loads(b"\x80\x04cos\nsystem\n."),
    }
    for event, act in acts.items():
        with watch.over(tmp_path / "inside") as seen:
            act()
        assert len(seen) == 1 and seen[0].startswith(event), (event, seen)
    with watch.over(tmp_path / "inside") as seen:
        (tmp_path / "inside" / "x").write_text("x")
    assert seen == []


# What the fuzzers found


@pytest.mark.parametrize("size", [8**11 - 1, 1 << 36, int("7f" * 11, 16)])
@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"0"])
def test_a_tar_header_that_asks_for_much(tmp_path, kind, size):
    info = tarfile.TarInfo("coal_ad/train/good/._a.png")  # which is skipped
    info.type, info.size = kind, size
    archive = tmp_path / "coal_ad_train.tar"
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(20 * 512))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"coal_ad_train\.tar is"):
        extract(archive, tmp_path / "out")


# Images that are large, or claim to be


def png(width: int, height: int, data: bytes) -> bytes:
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT": data, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks.items())


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (2**31 - 1, 1), (9_500, 9_500)])
def test_decompression_bombs(tmp_path, watch, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, zlib.compress(bytes(10**7), 9)))
    with pytest.raises(UnreadableError, match=r"bomb\.png"):
        read_picture(path)


@pytest.mark.parametrize("size", [(1, 1), (30_000, 10), (10, 30_000)])
def test_odd_sizes_are_taken(tmp_path, size):
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "odd.png")
    assert read_picture(tmp_path / "odd.png").image.size == size


# Names


HOSTILE = st.text(st.sampled_from("=+-@\t\r\n'\"<>&;,|\\ ‮﻿＝a1é/") | st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=100, deadline=None)
@given(HOSTILE)
def test_a_cell_is_one_cell_and_no_formula(name):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([safe_cell(name), "1.5"])
    ((cell, score),) = csv.reader(io.StringIO(text.getvalue(), newline=""))
    written = name.replace("\r", "\\r")
    assert score == "1.5" and cell in (written, "'" + written)
    shown = cell.lstrip(" ﻿")
    assert not shown.startswith(("=", "+", "-", "@", "\t", "\r", "＝"))


@settings(max_examples=100, deadline=None)
@given(HOSTILE)
def test_a_name_in_the_report_stays_text(name):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, attrs))

        def handle_data(self, data):
            found.append(data)

    reader = Reader(convert_charrefs=True)
    page = templates().from_string('<p data-name="{{ name }}">{{ name }}</p>').render(name=name)
    reader.feed(page)
    reader.close()
    (start, attrs), *text = found
    assert start == "p" and [key for key, _ in attrs] == ["data-name"]
    assert all(isinstance(part, str) for part in text)
    if not re.search(r"[\x00\r]", name):  # which HTML cannot say
        assert "".join(text) == name and attrs[0][1] == name
