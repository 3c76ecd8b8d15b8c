"""CoalAD's download from a local server that speaks ModelScope's two routes, and its unpacking."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import ssl
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, urlsplit

import pytest
from machine import PATIENCE, require
from stub_server import Answer, Server
from tiny import contents

from datasets import coalad
from utils.errors import InputError

MEMBERS = 3 * (512 + 40_448)  # bytes of three members of 40,000, padded to whole blocks


END = bytes(2 * tarfile.BLOCKSIZE)  # of an archive
GNU = tarfile.GNU_FORMAT


def member(name: str, content: bytes = b"", form: int = tarfile.PAX_FORMAT, **fields) -> bytes:
    """A member of an archive: header, content, padding."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def make_tar(files: dict[str, bytes]) -> bytes:
    return b"".join(member(name, content) for name, content in files.items()) + END


@pytest.fixture
def content() -> dict[str, bytes]:
    """What both archives hold together: path under the data folder -> bytes."""
    rng = random.Random(22)
    files = {f"coal_ad/train/good/{i:03}.jpg": rng.randbytes(40_000) for i in range(8)}
    files |= {
        f"coal_ad/test/{defect}/{i:03}.jpg": rng.randbytes(40_000) for defect in ("good", "wood") for i in range(2)
    }
    return files | {f"coal_ad/ground_truth/wood/{i:03}_mask.png": rng.randbytes(40_000) for i in range(2)}


@pytest.fixture
def archives(content) -> dict[str, bytes]:
    train = {name: data for name, data in content.items() if "/train/" in name}
    test = {name: data for name, data in content.items() if "/train/" not in name}
    return {"coal_ad_train.tar": make_tar(train), "coal_ad_test.tar": make_tar(test)}


class ModelScope(Server):
    """Lists `files` and serves them; `cut` breaks off after that many bytes of the train archive."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.listed = True
        self.cut: int | None = None
        self.flip = False
        self.downloads: list[tuple[str, str | None]] = []  # (file, Range header) of each download request
        super().__init__(Routes)


class Routes(Answer):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        repository = "/api/v1/datasets/lyfjwp/CoalAD/repo"
        if url.path == f"{repository}/tree" and self.server.listed:
            files = [
                {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.reply_json(200, {"Code": 200, "Success": True, "Data": {"Files": files}})
        elif url.path == repository:
            self.send_file(parse_qs(url.query)["FilePath"][0])
        else:
            self.reply_json(404, {"Code": 404, "Message": "not found"})

    def reply_json(self, status: int, value: dict):
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def send_file(self, name: str):
        wanted = self.headers.get("Range")
        self.server.downloads.append((name, wanted))
        data = self.server.files[name]
        if self.server.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        part = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        part["Content_Length"] = str(len(data) - start)
        cut = self.server.cut if name == "coal_ad_train.tar" else None
        self.close_connection = cut is not None
        self.reply(206 if wanted else 200, data[start:][:cut], **part)


@pytest.fixture
def server(archives):
    require("modelscope.hub.snapshot_download")
    with ModelScope(archives) as server:
        yield server


def stay_here(event: str, arguments: tuple) -> None:
    """An audit hook: no socket reaches anything but this machine."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[0] if event == "socket.getaddrinfo" else arguments[1][0]
        assert host == "127.0.0.1", host


def ensure_locally(data_root: Path, environment: dict[str, str], largest_file: int | None) -> tuple[str, str, str]:
    """How ensure_coalad ends, and what it prints, where no socket reaches anything but 127.0.0.1."""
    os.environ |= environment
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        del os.environ[name]
    sys.addaudithook(stay_here)
    if largest_file:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            end = "done", str(coalad.ensure_coalad(data_root))
        except Exception as error:
            end = type(error).__name__, str(error)
    return *end, printed.getvalue()


def call(data_root: Path, endpoint: str, largest_file: int | None = None) -> tuple[str, str]:
    """ensure_coalad in a process of its own; those of this module share one import of ModelScope's client."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["modelscope.hub.snapshot_download"])
    home = data_root.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {
        "HOME": str(home), "MODELSCOPE_ENDPOINT": endpoint,
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0", "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    with (
        mock.patch.dict(os.environ, environment),  # the client reads some as it is imported
        ProcessPoolExecutor(1, context) as pool,
    ):
        kind, message, printed = pool.submit(ensure_locally, data_root, environment, largest_file).result(PATIENCE)
    assert "Traceback" not in printed and "\n" not in message
    return kind, message


def test_download_puts_both_archives_in_place(tmp_path, server, content):
    data = tmp_path / "data"
    assert call(data, server.url) == ("done", str(data / "coal_ad"))
    assert contents(data) == content  # and nothing of the download is left
    assert [name for name, _ in server.downloads] == ["coal_ad_train.tar", "coal_ad_test.tar"]


def test_a_data_set_that_is_there_is_left_alone(tmp_path):
    image = tmp_path / "coal_ad/train/good/mine.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"mine")
    assert coalad.ensure_coalad(tmp_path) == tmp_path / "coal_ad"
    assert contents(tmp_path) == {"coal_ad/train/good/mine.png": b"mine"}


def test_a_cut_download_is_continued(tmp_path, server, content):
    data, size = tmp_path / "data", len(server.files["coal_ad_train.tar"])
    server.cut = 100_000
    kind, message = call(data, server.url)
    assert kind == "ConnectionError" and "again to continue" in message
    assert not (data / "coal_ad").exists()
    received = (data / ".coal_ad.download/coal_ad_train.tar.incomplete").stat().st_size
    assert 0 < received <= 100_000 < size

    server.cut, server.downloads = None, []
    assert call(data, server.url)[0] == "done"
    assert ("coal_ad_train.tar", f"bytes={received}-") in server.downloads
    assert contents(data) == content


def test_bytes_that_differ_from_the_listing_are_refused(tmp_path, server):
    server.flip = True
    kind, message = call(tmp_path / "data", server.url)
    assert kind == "ConnectionError" and "Hash mismatch" in message
    assert not list((tmp_path / "data").rglob("*.tar*"))


@pytest.mark.parametrize("how", ["no listing", "no archive", "nobody there"])
def test_where_coalad_cannot_be_had_the_message_says_how_to_get_it(tmp_path, server, how):
    endpoint = server.url
    if how == "no listing":
        server.listed = False
    elif how == "no archive":
        del server.files["coal_ad_test.tar"]
    else:
        endpoint = "http://127.0.0.1:1"
    kind, message = call(tmp_path / "data", endpoint)
    assert kind == "InputError"
    for part in ("https://www.modelscope.cn/datasets/lyfjwp/CoalAD", "Baidu", "1234", "train/good", "_mask.png"):
        assert part in message
    assert not (tmp_path / "data/coal_ad").exists()


def test_tls_certificates_are_verified(tmp_path, archives):
    require("modelscope.hub.snapshot_download")
    if not shutil.which("openssl"):
        pytest.skip("makes its certificate with openssl")
    certificate = tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", certificate, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ModelScope(archives)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # the refused handshakes
    with server:
        kind, message = call(tmp_path / "data", f"https://{server.host}")
    assert kind == "InputError" and "CERTIFICATE_VERIFY_FAILED" in message
    assert server.downloads == []


def test_a_disk_error_while_downloading_is_no_network_error(tmp_path, server):
    kind, message = call(tmp_path / "data", server.url, 100_000)  # no file may grow beyond that
    assert kind == "OSError" and f"[Errno {errno.EFBIG}]" in message
    assert not (tmp_path / "data/coal_ad").exists()


def test_without_modelscope_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(InputError, match="pip install modelscope"):
        coalad.ensure_coalad(tmp_path)


# From here on the archives are there already, and only the unpacking is tried.


@pytest.fixture
def download(monkeypatch, archives):
    """The archives a download would bring; a test changes them before it calls ensure_coalad."""

    def bring(folder: Path, target: Path) -> None:
        for name, data in archives.items():
            (folder / name).write_bytes(data)

    monkeypatch.setattr(coalad, "_download", bring)
    return archives


def sparse_header() -> bytes:
    """An old GNU sparse member that claims a terabyte."""
    header = bytearray(member("coal_ad/train/good/sparse.jpg", form=GNU, type=tarfile.GNUTYPE_SPARSE))
    header[483:495] = b"%011o\0" % (1 << 32)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


PAX_SPARSE = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,0", "GNU.sparse.name": "coal_ad/train/good/s"}
HOSTILE = {
    "absolute": member("/tmp/coal_ad_evil", b"x"),
    "absolute inside": member("/coal_ad/train/good/evil.jpg", b"x"),
    "parent": member("../evil", b"x"),
    "parent inside": member("coal_ad/../../evil", b"x"),
    "parent folder": member("coal_ad/../../evil", type=tarfile.DIRTYPE),
    "backslash": member("coal_ad\\..\\..\\evil", b"x"),
    "drive": member("coal_ad/C:evil", b"x"),
    "newline": member("coal_ad/a\nb.jpg", b"x"),
    "elsewhere": member("other/evil", b"x"),
    "no folder": member("evil.py", b"x"),
    "deep": member("coal_ad/" + "a/" * 20 + "evil", b"x"),
    "long": member("coal_ad/" + "a" * 300, b"x"),
    "symbolic link": member("coal_ad/train/good/l", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "write through a link": (
        member("coal_ad/l", type=tarfile.SYMTYPE, linkname="../../..") + member("coal_ad/l/evil", b"x")
    ),
    "hard link": member("coal_ad/train/good/l", type=tarfile.LNKTYPE, linkname="coal_ad/train/good/000.jpg"),
    "device": member("coal_ad/train/good/d", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "block device": member("coal_ad/train/good/d", type=tarfile.BLKTYPE, devmajor=8),
    "pipe": member("coal_ad/train/good/p", type=tarfile.FIFOTYPE),
    "unknown kind": member("coal_ad/train/good/u", type=b"Z"),
    "twice": member("coal_ad/train/good/t.jpg", b"a") + member("coal_ad/train/good/t.jpg", b"b"),
    "twice, other spelling": member("coal_ad/train/good/t.jpg", b"a") + member("./coal_ad//train/good/t.jpg", b"b"),
    "file as folder": member("coal_ad/train/good/t", b"a") + member("coal_ad/train/good/t/u", b"b"),
    "folder as file": member("coal_ad/train/good/t/u", b"a") + member("coal_ad/train/good/t", b"b"),
    "file in both archives": member("coal_ad/test/good/000.jpg", b"a"),
    "sparse by pax": member("coal_ad/train/good/sparse.jpg", pax_headers=PAX_SPARSE),
    # Headers that no writer makes.
    "nested headers": member("x" * 200, form=GNU)[:1024] * 3000,
    "sparse": sparse_header(),
    "size that lies": member("coal_ad/train/good/lie.jpg", form=GNU, size=1 << 40),
    "negative size": member("coal_ad/train/good/lie.jpg", form=GNU, size=-512),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, download, kind):
    data = tmp_path / "in/data"
    download["coal_ad_train.tar"] = download["coal_ad_train.tar"].removesuffix(END) + HOSTILE[kind] + END
    with pytest.raises(InputError, match=r"coal_ad_t(rain|est).tar is (refused|damaged)") as refusal:
        coalad.ensure_coalad(data)
    assert "\n" not in str(refusal.value)
    # Nothing but the hidden download folder, and the archive at fault is not kept.
    assert [path.name for path in data.iterdir()] == [".coal_ad.download"]
    assert not list(data.rglob("*.jpg"))
    assert {path for path in tmp_path.rglob("*") if data not in path.parents} <= {data, data.parent}
    assert not Path("/tmp/coal_ad_evil").exists()
    faulty = "coal_ad_test.tar" if kind == "file in both archives" else "coal_ad_train.tar"
    assert not (data / ".coal_ad.download" / faulty).exists()


def test_the_archive_before_the_hostile_members_is_accepted(tmp_path, download, content):
    """The refusals above are caused by the hostile members, not by the way the test builds the archive."""
    harmless = member("./", type=tarfile.DIRTYPE) + member("coal_ad/._train", b"x")
    download["coal_ad_train.tar"] = download["coal_ad_train.tar"].removesuffix(END) + harmless + END
    coalad.ensure_coalad(tmp_path)
    assert contents(tmp_path) == content


def test_too_many_members_are_refused(tmp_path, download, monkeypatch):
    monkeypatch.setattr(coalad, "MAX_MEMBERS", 7)
    with pytest.raises(InputError, match="more than 7 members"):
        coalad.ensure_coalad(tmp_path)


@pytest.mark.parametrize("spoil", [gzip.compress, lambda data: data[:MEMBERS], lambda data: data[: MEMBERS - 10_000]])
def test_a_compressed_or_truncated_archive_is_refused(tmp_path, download, spoil):
    download["coal_ad_train.tar"] = spoil(download["coal_ad_train.tar"])
    with pytest.raises(InputError, match=r"coal_ad_train.tar is damaged or not an uncompressed tar"):
        coalad.ensure_coalad(tmp_path)
    assert not (tmp_path / "coal_ad").exists()


@pytest.mark.parametrize("missing", ["train", "test"])
def test_archives_without_train_or_test_are_no_data_set(tmp_path, download, missing):
    download[f"coal_ad_{missing}.tar"] = make_tar({"coal_ad/readme.txt": b"nothing here"})
    with pytest.raises(InputError, match=f"no coal_ad/{missing}"):
        coalad.ensure_coalad(tmp_path)
    assert not (tmp_path / "coal_ad").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_extraction_leaves_no_data_set(tmp_path, download, content, monkeypatch, error):
    copy, calls = shutil.copyfileobj, []

    def break_off(source, target, length):
        calls.append(target.name)
        if len(calls) == 11:  # in the second archive
            target.write(b"half")
            raise error
        copy(source, target, length)

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "copyfileobj", break_off)
        with pytest.raises(type(error)) as raised:
            coalad.ensure_coalad(tmp_path)
    assert raised.value is error
    assert [path.name for path in tmp_path.iterdir()] == [".coal_ad.download"]
    assert not list(tmp_path.rglob("*.jpg"))
    coalad.ensure_coalad(tmp_path)
    assert contents(tmp_path) == content


def test_a_killed_extraction_leaves_no_data_set(tmp_path, download, content):
    """What a process killed by SIGKILL leaves behind is cleared by the next call."""
    left = tmp_path / ".coal_ad.download/unpacked/coal_ad/train/good/000.jpg"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    coalad.ensure_coalad(tmp_path)
    assert contents(tmp_path) == content
