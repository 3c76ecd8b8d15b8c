"""The authors' four files: what is read from them, what is refused, and that nothing in them is executed."""

import io
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from published_files import Published
from sklearn.cluster import KMeans
from stand_in import StandIn, close, noise
from tiny import golden, refusal, run_in_process

from benchmarks import reference
from models.branches.ma2patch import MA2Patch
from models.branches.ma_clu import MACLU
from models.branches.patchcore import PatchCore
from models.networks.backbones import BackboneSpec, empty_backbone
from models.published import checkpoints
from models.published.checkpoints import FILES, KMEANS_FILE, MA_CLU, PATCHCORE, read_published
from utils.errors import InputError


def refused(folder: Path) -> str:
    """The one line with which the files are refused, quickly."""
    start = time.thread_time()
    with pytest.raises(InputError) as error:
        read_published(folder)
    assert time.thread_time() - start < 2 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_numbers_are_those_of_the_files(tmp_path, protocol):
    files = Published(protocol=protocol)
    found, settings = read_published(files.write(tmp_path))
    for ours, theirs in ((found["ma_clu"], files.ma_clu), (found["ma2patch"], files.ma2patch)):
        assert torch.equal(ours["mean"], theirs["mean_vector"])
        assert torch.equal(ours["covariance"], theirs["cov_matrix"])
        assert torch.equal(ours["inverse"], theirs["inv_cov_matrix"])
    assert np.array_equal(found["ma_clu"]["centers"], files.centers)
    assert torch.equal(found["pc"]["bank"], files.patchcore["memory_bank"])
    assert settings == {"neighbors": 3, "coreset_ratio": 0.01, "image_size": 238}


def test_other_ways_of_saving_the_same(tmp_path):
    """A mean as a row, doubles, a view of a larger tensor, numpy's integer, byte and column order."""
    files = Published()
    files.ma_clu = {name: tensor.double() for name, tensor in files.ma_clu.items()}
    files.ma_clu["mean_vector"] = files.ma_clu["mean_vector"][None]
    large = torch.randn(30, 100)
    files.patchcore = {"memory_bank": large[5:25, 10:42], "other": large, "image_size": (124, 124)}
    files.kmeans["foreground_cluster"] = np.int64(files.kmeans["foreground_cluster"])
    files.kmeans["kmeans"].cluster_centers_ = np.asfortranarray(files.kmeans["kmeans"].cluster_centers_).astype(">f8")
    found, settings = read_published(files.write(tmp_path))
    assert torch.equal(found["ma_clu"]["mean"], files.ma_clu["mean_vector"][0])
    assert torch.equal(found["pc"]["bank"], large[5:25, 10:42])
    assert np.array_equal(found["ma_clu"]["centers"], files.centers)
    assert settings == {"neighbors": 3, "coreset_ratio": None, "image_size": 124}


@pytest.mark.parametrize(
    ("new", "old"), [(b"sklearn.cluster._kmeans", b"sklearn.cluster.k_means_"), (b"numpy._core", b"numpy.core")]
)
def test_names_of_older_libraries(tmp_path, new, old):
    files = Published(protocol=3)
    folder = files.write(tmp_path)
    data = (folder / KMEANS_FILE).read_bytes()
    swapped = data.replace(new, old) if new in data else data.replace(old, new)
    assert swapped != data
    (folder / KMEANS_FILE).write_bytes(swapped)
    assert np.array_equal(read_published(folder)[0]["ma_clu"]["centers"], files.centers)


# Pickles that would run something. Each writes to `marker` (or ends the process) if anything is ever called.


def calls(module: str, name: str, argument: str, protocol: int = 4) -> bytes:
    """A pickle that calls module.name(argument)."""
    text = argument.encode()
    if protocol < 2:
        return f"c{module}\n{name}\n(V{argument}\ntR.".encode()
    named = f"c{module}\n{name}\n".encode()
    if protocol == 4:
        named = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    return bytes([0x80, protocol]) + named + b"X" + len(text).to_bytes(4, "little") + text + b"\x85R."


ATTACKS = {  # what is called with which argument
    "touch {}": "os:system posix:system nt:system subprocess:check_output",
    "open({!r}, 'w').write('called')": """
        builtins:eval builtins:exec __builtin__:eval pdb:run timeit:timeit numpy.testing._private.utils:runstring
    """,
    "{}": """
        __builtin__:execfile builtins:open builtins:getattr builtins:__import__ importlib:import_module
        functools:partial os:_exit numpy:load numpy:save numpy:memmap numpy:ndarray.tofile
        numpy.core.multiarray:fromfile numpy._core.multiarray:_reconstruct.__globals__ copyreg:_reconstructor
        copyreg:__newobj__ copy_reg:_reconstructor sklearn.cluster._kmeans:KMeans.fit sklearn.externals.joblib:load
        torch:load torch.hub:load pickle:loads _pickle:loads webbrowser:open code:interact sys:exit operator:attrgetter
    """,
}


@pytest.mark.parametrize("file", [KMEANS_FILE, MA_CLU, PATCHCORE])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_call_is_made_and_its_name_is_told(tmp_path, protocol, file):
    folder = Published().write(tmp_path / "src")
    good = (folder / file).read_bytes()
    marker = tmp_path / "called"
    attacks = [(*name.split(":"), argument) for argument, names in ATTACKS.items() for name in names.split()]
    assert len(attacks) == 36
    for module, name, argument in attacks:
        attack = calls(module, name, argument.format(str(marker)), protocol)
        (folder / file).write_bytes(attack if file == KMEANS_FILE else repack(good, attack))
        said = refused(folder)
        assert file in said and f"{module}.{name}" in said and not marker.exists()


def repack(archive: bytes, program: bytes | None = None, more: dict[str, bytes] | None = None, **options) -> bytes:
    """A file of torch.save with another data.pkl, with more records, or packed with options of zipfile's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w", **options) as target:
        for info in source.infolist():
            other = program is not None and info.filename.endswith("/data.pkl")
            target.writestr(info.filename, program if other else source.read(info))
        for name, content in (more or {}).items():
            target.writestr(name, content)
    return buffer.getvalue()


def test_the_attacks_are_real():
    """Python's own unpickler does run them: the refusals above are not caused by malformed pickles."""
    for protocol in (0, 2, 4):
        assert pickle.loads(calls("builtins", "len", "four", protocol)) == 4
    assert pickle.loads(b"\x80\x02" + nested(2) + b".") == ((1, 1), (1, 1))


def nested(depth: int) -> bytes:
    """Steps to a tuple that takes 2**depth others to hash."""
    return b"K\x01" + b"".join(b"q%ch%c\x86" % (100 + i, 100 + i) for i in range(depth))


BUILD_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
DTYPE = (
    b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


def model(centers: bytes) -> bytes:
    """A pickle of a KMeans whose centres are what `centers` builds."""
    return (
        b"\x80\x04}(X\x06\x00\x00\x00kmeans" + b"csklearn.cluster._kmeans\nKMeans\n)\x81}"
        b"X\x10\x00\x00\x00cluster_centers_" + centers + b"sb"
        b"X\x12\x00\x00\x00foreground_clusterK\x00u."
    )  # fmt: skip


def build(shape: bytes, data: bytes, dtype: bytes = DTYPE) -> bytes:
    return BUILD_ARRAY + b"(K\x01" + shape + dtype + b"\x89B" + len(data).to_bytes(4, "little") + data + b"tb"


HUGE = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
DAMAGED = {
    "empty": b"",
    "text": b"this is no pickle\n",
    "zip": b"PK\x03\x04" + bytes(50),
    "no stop": b"\x80\x04}",
    "stop alone": b"\x80\x04.",
    "another value": pickle.dumps([1, 2, 3]),
    "no model": pickle.dumps({"kmeans": 3, "foreground_cluster": 0}),
    "hash bomb": b"\x80\x04}" + nested(60) + b"K\x01s.",
    "memo bomb": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "length that lies": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"abc.",
    "frame that lies": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"N.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + b".",
    "too many steps": b"\x80\x04]" + b"Na" * 20_000 + b".",
    "deep": b"\x80\x04" + b"]" * 4_900 + b"a" * 4_899 + b".",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02Pname\n.",
    "old instance": b"(ios\nsystem\n.",
    "object of a call": b"\x80\x02cnumpy\ndtype\n)R)R.",
    "state of a name": b"\x80\x02cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.",
    "huge shape": model(build(HUGE + HUGE + b"\x86", bytes(16))),
    "shape beyond memory": model(build(b"K\x02" + b"\x8a\xff" + b"\x7f" * 255 + b"\x86", bytes(16))),
    "negative shape": model(build(b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86", bytes(16))),
    "many dimensions": model(build(b"(" + b"K\x01" * 100 + b"t", bytes(8))),
    "objects": model(build(b"K\x02K\x01\x86", bytes(16), DTYPE.replace(b"f8", b"O8"))),
    "strings": model(build(b"K\x02K\x01\x86", bytes(16), DTYPE.replace(b"f8", b"S8"))),
    "not finite": model(build(b"K\x02K\x01\x86", b"\xff" * 16)),
    "three clusters": model(build(b"K\x03K\x01\x86", bytes(24))),
    "one dimension": model(build(b"K\x02\x85", bytes(16))),
}  # fmt: skip


def test_the_hand_made_model_is_well_formed(tmp_path):
    folder = Published(dim=3).write(tmp_path)
    values = np.arange(6.0).reshape(2, 3)
    (folder / KMEANS_FILE).write_bytes(model(build(b"K\x02K\x03\x86", values.tobytes())))
    assert np.array_equal(read_published(folder)[0]["ma_clu"]["centers"], values)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_and_lying_pickles_are_refused_at_once(tmp_path, kind):
    folder = Published(dim=1).write(tmp_path)
    (folder / KMEANS_FILE).write_bytes(DAMAGED[kind])
    assert KMEANS_FILE in refused(folder)


@pytest.mark.parametrize("value", [2, -1, 0.0, True, "0", None, np.float64(1), np.zeros(2, int)])
def test_the_foreground_is_cluster_0_or_1(tmp_path, value):
    files = Published()
    files.kmeans["foreground_cluster"] = value
    assert KMEANS_FILE in refused(files.write(tmp_path))


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_or_missing_file_is_named(tmp_path, file):
    folder = Published().write(tmp_path)
    data = (folder / file).read_bytes()
    for length in (0, 1, 10, len(data) // 2, len(data) - 1):
        (folder / file).write_bytes(data[:length])
        assert file in refused(folder)
    (folder / file).unlink()
    assert f"lacks {file};" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.ma_clu.pop("inv_cov_matrix"),
        lambda files: files.ma_clu.update(inv_cov_matrix=torch.eye(15)),
        lambda files: files.ma_clu.update(cov_matrix=torch.eye(16, dtype=torch.long)),
        lambda files: files.ma_clu.update(mean_vector=torch.zeros(16, 16)),
        lambda files: files.ma_clu.update(mean_vector=torch.tensor(1.0)),
        lambda files: files.ma_clu.update(mean_vector=[0.0] * 16),
        lambda files: files.ma2patch["inv_cov_matrix"].__setitem__((3, 4), float("nan")),
        lambda files: files.ma2patch["mean_vector"].__setitem__(0, float("inf")),
        lambda files: files.patchcore.update(memory_bank=torch.zeros(0, 32)),
        lambda files: files.patchcore.update(memory_bank=torch.zeros(32)),
        lambda files: files.patchcore.update(memory_bank=torch.zeros(1).expand(1 << 20, 1 << 20)),
        lambda files: files.patchcore.update(memory_bank=torch.zeros(1).expand(100, 100)),
        lambda files: files.patchcore.update(memory_bank=torch.eye(4).to_sparse()),
        lambda files: files.patchcore.update(k_nearest=0),
        lambda files: files.patchcore.update(k_nearest="3"),
        lambda files: files.patchcore.update(backbone="resnet18"),
        lambda files: files.patchcore.update(other=Path("a")),
        lambda files: setattr(files, "patchcore", torch.eye(3)),
        lambda files: setattr(files, "kmeans", Published(dim=17).kmeans),
        lambda files: files.kmeans.update(kmeans=KMeans(2)),
        lambda files: files.kmeans.update(kmeans=KMeans(3, random_state=0).fit(np.eye(16))),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, change):
    files = Published()
    change(files)
    said = refused(files.write(tmp_path))
    assert any(name in said for name in FILES)


BANK_SHAPE, BANK_COUNT = b"K2K \x86", b"M@\x06"  # 50 x 32, and 1600 numbers in the storage
LIES = {
    "more rows": [(BANK_SHAPE, b"M\xff\xffK \x86")],
    "negative width": [(BANK_SHAPE, b"K2J\xe0\xff\xff\xff\x86")],
    "long storage": [(BANK_COUNT, b"J\x00\x00\x00\x10")],
    "long storage in full": [(BANK_COUNT, b"J\x00\x00\x00\x10"), (BANK_SHAPE, b"J\x00\x00\x80\x00K \x86")],
    "storage of less than nothing": [(BANK_COUNT, b"J\xff\xff\xff\xff")],
    "the next record's bytes": [(BANK_COUNT, b"M\x60\x06"), (BANK_SHAPE, b"K3K \x86")],
    "nested shape": [(BANK_SHAPE, nested(60))],
    "nested storage": [(b"X\x01\x00\x00\x000", nested(60))],
}


def lying(good: bytes, lies: list[tuple[bytes, bytes]]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        program = archive.read("pc_memory_bank/data.pkl")
    for old, new in lies:
        assert program.count(old) == 1
        program = program.replace(old, new)
    return repack(good, program)


def overlapping(good: bytes) -> bytes:
    buffer = io.BytesIO(good)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.filelist += [archive.getinfo("pc_memory_bank/data/0")] * 50
        archive.comment = b"so that the list is written again"
    return buffer.getvalue()


def flipped(good: bytes) -> bytes:
    place = good.index(Published().patchcore["memory_bank"].numpy().tobytes())
    return good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]


ZEROS = {"pc_memory_bank/data/9": bytes(1 << 20)}
PROGRAMS = {  # that torch would run for long
    "a call that fills 2 GB": ("builtins.bytearray", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "a large tensor": (
        "torch.FloatTensor",
        b"\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x01\x00J\x00\x00\x01\x00\x86R.",
    ),
    "a nested key": ("in the place of a str", b"\x80\x02}" + nested(60) + b"K\x01s."),
    "a nested item": ("no dictionary", b"\x80\x02ccollections\nOrderedDict\n]" + nested(60) + b"K\x01\x86a\x85R."),
    "an empty dictionary": ("no dictionary", b"\x80\x02ccollections\nOrderedDict\n)R."),
}
BANKS = {  # what is said of the good file changed so
    **{lie: (PATCHCORE, lambda good, lies=lies: lying(good, lies)) for lie, lies in LIES.items()},
    **{name: (said, lambda good, code=code: repack(good, code)) for name, (said, code) in PROGRAMS.items()},
    # It would unpack to a thousand times its size; so would one whose records overlap.
    "zeros": ("compressed", lambda good: repack(good, more=ZEROS, compression=zipfile.ZIP_DEFLATED)),
    "overlapping records": ("overlap", overlapping),
    "two programs": ("not written by torch.save", lambda good: repack(good, more={"other/data.pkl": b"\x80\x02}."})),
    "a flipped bit": ("Bad CRC-32", flipped),
}


@pytest.mark.parametrize("kind", BANKS)
def test_banks_that_lie_or_that_torch_did_not_write_are_refused(tmp_path, kind):
    said, change = BANKS[kind]
    path = Published().write(tmp_path) / PATCHCORE
    path.write_bytes(change(path.read_bytes()))
    line = refused(tmp_path)
    assert said in line and PATCHCORE in line


def test_pickles_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 1 << 10)
    assert "larger than" in refused(Published().write(tmp_path))


# The branches made of the files.


def test_the_published_programs_files_give_its_scores_and_maps(tmp_path):
    """Its stored means, inverses and centres in; its scores and maps for six images out."""
    stored = {name: golden(name) for name in ("ma_clu", "ma2patch")}
    files = Published()
    for name, arrays in stored.items():
        mean, covariance = (torch.from_numpy(arrays[key]) for key in ("mean", "cov"))
        inverse = torch.linalg.inv(covariance + 1e-6 * torch.eye(16))
        if "inv_cov" in arrays:
            inverse = torch.from_numpy(arrays["inv_cov"])
        setattr(files, name, {"mean_vector": mean, "cov_matrix": covariance, "inv_cov_matrix": inverse})
    files.kmeans["kmeans"].cluster_centers_ = stored["ma_clu"]["cluster_centers"]
    files.kmeans["foreground_cluster"] = int(stored["ma_clu"]["foreground_cluster"])
    published, _ = read_published(files.write(tmp_path))
    network = StandIn(140, (10, 10), 16)
    network.cls_dim = network.dim
    ma_clu, ma2patch = MACLU(network), MA2Patch(network)
    ma_clu.load_state(published["ma_clu"])
    ma2patch.load_state(published["ma2patch"])
    tokens = {name: torch.from_numpy(arrays["test_tokens"]) for name, arrays in stored.items()}
    assert close(ma_clu.confidence(tokens["ma_clu"][:, 1:]), stored["ma_clu"]["patch_confidence"], 1e-3)
    results = {
        "ma_clu": ma_clu.score((tokens["ma_clu"][:, 0], tokens["ma_clu"][:, 1:])),
        "ma2patch": ma2patch.score(tokens["ma2patch"][:, 1:]),
    }
    for name, part in results.items():
        assert close(part.scores, stored[name]["score"], 1e-3)
        assert close(part.scaled(), stored[name]["anomaly_map"], 1e-3)


@pytest.fixture
def small_networks(monkeypatch):
    """timm's smallest networks instead of the authors'; returns their widths."""
    networks = {"ma_clu": ("test_vit", 160), "ma2patch": ("test_vit", 160), "pc": ("test_resnet", 96)}
    monkeypatch.setattr("models.published.checkpoints.METHOD", networks)
    kinds = ("tokens", "tokens", "maps")
    specs = (BackboneSpec(kind, *network) for kind, network in zip(kinds, networks.values(), strict=True))
    return tuple(empty_backbone(spec).dim for spec in specs)


def convert(source: Path, models: Path) -> str:
    """What the script says on stderr; "" where it succeeds."""
    weights = [item for flag in ("ma-clu", "ma2patch", "pc") for item in (f"--{flag}-weights", "random")]
    finished = run_in_process("convert_published", source, "--models-dir", models, *weights)
    assert (finished.code, len(finished.err.splitlines())) in ((0, 0), (2, 1))
    return finished.err


def test_converted_branches_compute_with_the_files_numbers(tmp_path, small_networks):
    files = Published(*small_networks)
    # Not the inverse of the covariance: the stored one must be used.
    for file in (files.ma_clu, files.ma2patch):
        file["inv_cov_matrix"] = file["inv_cov_matrix"] * 1.7
    files.patchcore["image_size"] = 160
    assert convert(files.write(tmp_path / "src"), tmp_path / "models") == ""
    folder = tmp_path / "models/coal_ad"
    branches = {
        branch.name: branch.load(folder / f"{branch.name}.safetensors") for branch in (MACLU, MA2Patch, PatchCore)
    }
    assert len(list(folder.iterdir())) == 3
    assert branches["pc"].neighbors == 3 and branches["pc"].coreset_ratio == 0.01
    states = {
        name: {"mean": file["mean_vector"], "inverse": file["inv_cov_matrix"]}
        for name, file in (("ma_clu", files.ma_clu), ("ma2patch", files.ma2patch))
    }
    states["ma_clu"]["centers"] = torch.from_numpy(files.centers)
    states["pc"] = {"bank": files.patchcore["memory_bank"]}
    vit = reference.whole_network(BackboneSpec("tokens", "test_vit", 160, weights="random"))
    resnet = reference.whole_network(BackboneSpec("maps", "test_resnet", 160, weights="random"))
    nets = {"ma_clu": vit, "ma2patch": vit, "pc": resnet}
    loop = reference.PublishedLoop(nets, states, dict.fromkeys(nets, 160))
    for image in noise(160, 3).split(1):
        expected = loop(image)
        for name, branch in branches.items():
            part = branch.predict(image)
            assert float(part.scores[0]) == pytest.approx(expected[name][0], rel=1e-4)
            assert close(part.scaled()[0], expected[name][1], 1e-3)


def test_files_of_other_networks_write_nothing(tmp_path, small_networks):
    source = Published(dim=64, dim2=32).write(tmp_path / "src")
    assert "the files of ma2patch are not for test_vit" in convert(source, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_foreign_files_are_not_overwritten(tmp_path):
    target = tmp_path / "models/coal_ad/pc.safetensors"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"precious")
    assert "pc.safetensors" in convert(Published().write(tmp_path / "src"), tmp_path / "models")
    assert target.read_bytes() == b"precious" and len(list(target.parent.iterdir())) == 1


def test_the_command_line_ends_with_2_and_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Published().write(tmp_path / "src")
    (folder / KMEANS_FILE).write_bytes(calls("os", "system", f"touch {tmp_path / 'called'}"))
    refusal("convert_published", folder)
    refusal("convert_published", folder, "--categroy", "x")
    assert not (tmp_path / "called").exists() and not (tmp_path / "saved_models").exists()
