"""Whatever is wrong: one line that says so, the right exit code, and no file touched."""

import multiprocessing
import os
import pickle
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import draw_category, refusal, small_files, small_flags, succeed

import training.training
from models.networks.libraries import full_network
from models.networks.weights import random_state_dict
from utils.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from utils.command_line import run


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def refused(root: Path, script: str, *flags, said: str | list[str], categories=(), code: int = 2) -> None:
    """Run the script; check exit code, the one line with the words `said` in it, and that `root` stays as it was."""
    before = snapshot(root)
    line = refusal(script, *small_flags(root, script, *categories), *flags, code=code)
    assert line.startswith("error: ")
    for word in [said] if isinstance(said, str) else said:
        assert word in line, line
    assert snapshot(root) == before


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fails a test whose script gets as far as a network."""

    def build(*_, **__):
        pytest.fail("the network was built before the flags were checked")

    monkeypatch.setattr(training.training, "build_backbone", build)
    monkeypatch.setattr("models.branches.branch.build_backbone", build)
    monkeypatch.setattr("datasets.coalad.ensure_coalad", build)


# Flags


BAD_FLAGS = [
    ("train_pc", "--epochs 3", "--epochs --help"),
    ("train_pc", "--batchsize 3", "--batchsize --batch-size"),
    ("train_pc", "--batch 3", "--batch"),
    ("train_pc", "stray", "stray"),
    ("train_pc", "--batch-size 0", "--batch-size 0 least"),
    ("train_pc", "--batch-size x", "--batch-size x"),
    ("train_pc", "--batch-size 99999999999999999999", "--batch-size 65536"),
    ("train_pc", "--patch-budget 1e300", "--patch-budget"),
    ("train_pc", "--patch-budget 1e-9", "--patch-budget"),
    ("train_ma_clu", "--threshold -1e-3", "--threshold --flag=-1e-3"),
    ("test_fusion", "--false-alarm-rate 1e-20", "--false-alarm-rate 1e-06"),
    ("train_pc", "--workers -1", "--workers"),
    ("train_pc", "--workers 1000000", "--workers"),
    ("train_pc", "--seed -1", "--seed"),
    ("train_pc", "--image-size 0", "--image-size"),
    ("train_pc", "--image-size 1000000000", "--image-size 4096"),
    ("train_pc", "--image-size 20", "--image-size 20 small"),
    ("train_pc", "--train-ratio 0", "--train-ratio"),
    ("train_pc", "--train-ratio 1.5", "--train-ratio"),
    ("train_pc", "--train-ratio nan", "--train-ratio nan"),
    ("train_pc", "--train-ratio 0.1", "--train-ratio 0.1"),
    ("train_pc", "--holdout-ratio 1", "--holdout-ratio"),
    ("train_pc", "--holdout-ratio -0.1", "--holdout-ratio"),
    ("train_pc", "--holdout-ratio 0.1", "--holdout-ratio 0.1"),
    ("train_pc", "--coreset-ratio 0", "--coreset-ratio"),
    ("train_pc", "--coreset-ratio inf", "--coreset-ratio inf"),
    ("train_pc", "--neighbors 0", "--neighbors"),
    ("train_pc", "--neighbors 1.5", "--neighbors whole"),
    ("train_pc", "--threshold 1.2", "--threshold"),
    ("train_pc", "--covariance empirical", "--covariance"),
    ("train_pc", "--position-size 64", "--position-size"),
    ("train_pc", "--backbone no_such_net", "--backbone no_such_net"),
    ("train_pc", "--backbone vit_tiny_patch16_224", "--backbone vit_tiny_patch16_224"),
    ("train_pc", "--weights nowhere.safetensors", "--weights nowhere.safetensors"),
    ("train_pc", "--weights nonsense", "nonsense"),
    ("train_pc", "--precision fp8", "--precision fp8"),
    ("train_pc", "--precision fp16", "--precision fp16 GPU"),
    ("train_pc", "--precision tf32", "--precision tf32 GPU"),
    ("train_pc", "--device cuda:99", "--device cuda:99"),
    ("train_pc", "--device tpu", "--device tpu auto"),
    ("train_pc", "--device meta", "--device meta"),
    ("train_pc", "--no-eval --save-maps", "--save-maps --no-eval; drop"),
    ("train_pc", "--no-eval --no-images", "error: --no-images has no effect"),
    ("train_pc", "--category ..", "--category '..'"),
    ("train_pc", "--category a/b", "--category 'a/b'"),
    ("train_pc", r"--category a\b", "--category"),
    ("train_pc", "--category .hidden", "--category"),
    ("train_pc", "--category /etc", "--category"),
    ("train_pc", "--category", "--category"),
    ("train_pc", "--category=", "--category"),
    ("train_pc", "--category belt nowhere", "nowhere --category"),
    ("train_ma_clu", "--threshold 0", "--threshold"),
    ("train_ma_clu", "--threshold nan", "--threshold"),
    ("train_ma_clu", "--covariance full", "--covariance full"),
    ("train_ma_clu", "--coreset-ratio 0.1", "--coreset-ratio"),
    ("train_ma_clu", "--image-size 65", "--image-size 65 64 80"),
    ("train_ma_clu", "--position-size 50", "--position-size 50 48 64"),
    ("train_ma_clu", "--backbone test_resnet --position-size 64", "--position-size test_resnet"),
    ("train_ma2patch", "--threshold 1", "--threshold"),
    ("test_fusion", "--lambda-obj -1", "--lambda-obj"),
    ("test_fusion", "--lambda-map x", "--lambda-map"),
    ("test_fusion", "--fusion mean", "--fusion mean"),
    ("test_fusion", "--fusion standardized --lambda-obj 0.01", "--lambda-obj standardized"),
    ("test_fusion", "--fusion standardized --lambda-map 1", "--lambda-map standardized"),
    ("test_fusion", "--image-size 64", "--image-size"),
    ("test_fusion", "--weights random", "--weights"),
    ("test_fusion", "--holdout-ratio 0.2", "--holdout-ratio"),
    ("test_fusion", "--no-eval", "--no-eval"),
    ("test_fusion", "--category ../belt", "--category"),
    ("test_fusion", "--category nowhere", "nowhere"),
]


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(("script", "flags", "words"), BAD_FLAGS)
def test_flags(trained, script, flags, words):
    refused(trained, script, *flags.split(), said=words.split())


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("flags", ["--image-size 20", "--weights nowhere.pth", "--backbone no_such_net"])
def test_nothing_is_downloaded_before_flags_are_checked(trained, flags):
    refused(trained, "train_pc", *flags.split(), said=flags.split()[0], categories=["coal_ad"])


@pytest.mark.usefixtures("nothing_is_built")
def test_missing_checkpoints_are_found_before_the_download(trained):
    words = ["ma_clu.safetensors, ma2patch.safetensors, pc.safetensors", "train", "convert_published.py"]
    refused(trained, "test_fusion", said=words, categories=["coal_ad"])


# Folders and files


def put_file_in_place_of(path: Path) -> None:
    """A file where a folder was."""
    shutil.rmtree(path)
    path.write_text("mine")


ONE = {"bank": torch.ones(1)}
IN_THE_WAY = [  # what is spoilt below the workplace, and what is said before a network is built
    (lambda root: shutil.rmtree(root / "data"), ["no category", "--data-root"]),
    (lambda root: shutil.rmtree(root / "data/belt"), ["belt", "--category"]),
    (lambda root: shutil.rmtree(root / "data/belt/train"), [str(Path("train/good")), "no images"]),
    (
        lambda root: [path.unlink() for path in (root / "data/belt/train/good").iterdir()],
        [str(Path("train/good")), "no images"],
    ),
    (lambda root: shutil.rmtree(root / "data/belt/test"), ["test", "--no-eval"]),
    (lambda root: [shutil.rmtree(root / "data/belt/test" / kind) for kind in ("good", "rope")], ["test", "no images"]),
    (lambda root: (root / "data/belt/ground_truth/rope/002_mask.png").unlink(), ["002_mask.png", "add it"]),
    (lambda root: shutil.copy(root / "data/belt/test/good/000.png", root / "data/belt/test/good/000.bmp"), ["000.bmp"]),
    (lambda root: put_file_in_place_of(root / "data"), ["--data-root", "folder"]),
    # Other programs' files are not overwritten.
    (lambda root: (root / "models/belt/pc.safetensors").write_text("mine"), ["not a USAD checkpoint", "models"]),
    (lambda root: save_file(ONE, root / "models/belt/pc.safetensors"), ["not a USAD checkpoint"]),
    (lambda root: put_file_in_place_of(root / "models"), ["models", "folder"]),
    (lambda root: put_file_in_place_of(root / "result"), ["result", "folder"]),
    (lambda root: (root / "result/belt/pc/config.json").write_text('{"program": "x"}'), ["did not write"]),
    (lambda root: (root / "result/belt/pc/config.json").write_text("{"), ["did not write"]),
    (lambda root: (root / "result/belt/pc/config.json").unlink(), ["did not write", "--results-dir"]),
    (lambda root: (root / "result/average_pc.json").write_text('{"mine": 1}'), ["average_pc.json"]),
]


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(("spoil", "words"), IN_THE_WAY)
def test_folders_and_files_in_the_way(workplace, spoil, words):
    spoil(workplace)
    refused(workplace, "train_pc", said=words)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_training_image(workplace, workers):
    truncate(workplace / "data/belt/train/good/005.png")
    flags = ["--train-ratio", 1, "--workers", workers]
    refused(workplace, "train_pc", *flags, said=["005.png", "cannot be read"])
    assert not multiprocessing.active_children()  # at the script's end they would be waited for in vain


def damage(part: int, change):
    """Damage to a checkpoint's tensors (0) or metadata (1): `change` is called with them."""

    def spoil(path: Path) -> None:
        content = load_checkpoint(path)
        change(content[part])
        save_checkpoint(path, *content)

    return spoil


of_tensors, of_metadata = (partial(damage, part) for part in (0, 1))
IMAGES = {  # below data/belt
    "test image": (lambda belt: truncate(belt / "test/rope/001.png"), ["001.png", "cannot be read"]),
    "mask": (lambda belt: truncate(belt / "ground_truth/rope/001_mask.png"), ["001_mask.png", "cannot be read"]),
    "size": (
        lambda belt: Image.new("L", (9, 9)).save(belt / "ground_truth/rope/003_mask.png"),
        ["003_mask.png", "9x9"],
    ),
    "no image": (lambda belt: (belt / "test/good/000.png").write_text("text"), ["000.png", "cannot be read"]),
    **{
        name: (lambda belt, name=name: (belt / "test/good").rename(belt / "test" / name), [f"test/{name}", "rename"])
        for name in ("Good", "GOOD")
    },
    "floats": (lambda belt: Image.fromarray(np.ones((9, 9), np.float32)).save(belt / "test/good/x.tiff"), ["x.tiff"]),
}
NETWORKS_THAT_CANNOT_BE = [  # which the fuzzers found
    *(("image_size", 2**56), ("image_size", 0), ("image_size", True), ("position_size", -1), ("name", ["a"])),
    *(("mean", [None, 0.4, 0.4]), ("mean", ["0.4"] * 3), ("std", [float("inf"), 1, 1]), ("std", [[1], 1, 1])),
    *(("seed", 10**30), ("seed", 1.5), ("weights", "x"), ("kind", 1)),
]
CHECKPOINTS = {  # models/belt/pc.safetensors
    "missing": (lambda path: path.unlink(), ["has no pc.safetensors", "train", "convert_published.py"]),
    "empty": (lambda path: path.write_bytes(b""), ["pc.safetensors"]),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-50]), ["pc.safetensors", "truncated"]),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:100]), ["pc.safetensors", "truncated"]),
    "text": (lambda path: path.write_text("hello" * 100), ["pc.safetensors"]),
    "pickled": (lambda path: torch.save({"bank": torch.ones(3, 240)}, path), ["pc.safetensors", "convert"]),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), ["pc.safetensors"]),
    "foreign": (lambda path: save_file({"bank": torch.ones(3, 240)}, path), ["not a USAD checkpoint"]),
    "other branch": (lambda path: shutil.copy(path.with_name("ma_clu.safetensors"), path), ["'ma_clu'", "'pc'"]),
    "folder": (lambda path: (path.unlink(), path.mkdir()), ["pc.safetensors"]),
    "tensor missing": (of_tensors(lambda t: t.update(x=t.pop("bank"))), ["'bank' is missing"]),
    "other width": (of_tensors(lambda t: t.update(bank=t["bank"][:, 1:])), ["'bank'", "240"]),
    "integers": (of_tensors(lambda t: t.update(bank=t["bank"].int())), ["'bank'", "floats"]),
    "no rows": (of_tensors(lambda t: t.update(bank=t["bank"][:0])), ["'bank'"]),
    "not finite": (of_tensors(lambda t: t["bank"][0].fill_(np.nan)), ["'bank'", "finite"]),
    "no backbone": (of_metadata(lambda m: m.pop("backbone")), ["metadata"]),
    "unknown setting": (of_metadata(lambda m: m["settings"].update(x=1)), ["metadata"]),
    "setting of a type": (of_metadata(lambda m: m["settings"].update(neighbors={})), ["metadata"]),
    "half statistics": (of_metadata(lambda m: m["calibration"].pop("map_std")), ["metadata", "map_std"]),
    "a spread of zero": (of_metadata(lambda m: m["calibration"].update(top_std=0.0)), ["metadata", "top_std"]),
    "statistics of no image": (of_metadata(lambda m: m["calibration"].update(images=0)), ["metadata", "images"]),
    "a setting beyond numbers": (of_metadata(lambda m: m["settings"].update(neighbors=float("inf"))), ["metadata"]),
    "two colours": (of_metadata(lambda m: m["backbone"].update(mean=[0.5, 0.5])), ["metadata", "colours"]),
    "other weights": (of_metadata(lambda m: m["backbone"].update(seed=5)), ["weights", "--pc-weights"]),
    "no weights named": (of_metadata(lambda m: m["backbone"].pop("weights")), ["pc.safetensors", "metadata"]),
    **{
        f"{lie}": (of_metadata(lambda m, lie=lie: m["backbone"].update([lie])), ["pc.safetensors"])
        for lie in NETWORKS_THAT_CANNOT_BE
    },
    **{
        f"metadata {text[:9]}": (lambda path, text=text: save_file(ONE, path, {FORMAT: text}), ["pc.safetensors"])
        for text in ("[]", "{", "[" * 100_000, "1")
    },
    "unknown network": (of_metadata(lambda m: m["backbone"].update(name="no_such")), ["no_such"]),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_test_images(workplace, kind):
    spoil, words = IMAGES[kind]
    spoil(workplace / "data" / "belt")
    refused(workplace, "test_fusion", said=words)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(workplace, kind):
    spoil, words = CHECKPOINTS[kind]
    spoil(workplace / "models" / "belt" / "pc.safetensors")
    refused(workplace, "test_fusion", said=["pc", *words])


def test_one_training_image(workplace):
    for path in list((workplace / "data/belt/train/good").iterdir())[1:]:
        path.unlink()
    refused(workplace, "train_ma_clu", said=["1 training image", "train/good"])


def test_no_held_out_statistics(workplace):
    succeed(workplace, "train_pc", "--no-eval")
    refused(workplace, "test_fusion", "--fusion", "standardized", said=["'pc'", "--holdout-ratio"])


def test_a_missing_checkpoint_of_the_second_category_is_found_first(workplace):
    draw_category(workplace / "data" / "second")
    refused(workplace, "test_fusion", said=["second", "pc.safetensors"], categories=["belt", "second"])


# Weights given as files


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of train_pc's small network, drawn with a seed, to a file."""

    def write(name: str, seed: int) -> Path:
        state = random_state_dict(lambda: full_network("test_resnet"), seed)
        torch.save(state, tmp_path / name) if name.endswith(".pth") else save_file(state, tmp_path / name)
        return tmp_path / name

    return write


def test_weights_that_moved_or_changed(workplace, weights):
    path = weights("net.pth", 1)
    succeed(workplace, "train_pc", "--weights", path, "--no-eval", "--holdout-ratio", 0.25)
    path.unlink()
    refused(workplace, "test_fusion", said=["net.pth", "no such file; --pc-weights says where it is now"])
    other = weights("other.pth", 2)
    refused(workplace, "test_fusion", "--pc-weights", other, said=["other.pth", "--pc-weights"])
    succeed(workplace, "test_fusion", "--pc-weights", weights("moved.safetensors", 1), "--no-images")


# What is in the way of new files


def test_a_picture_of_ones_own_among_the_results(tmp_path):
    draw_category(tmp_path / "data" / "belt")
    own = tmp_path / "result" / "belt" / "pc" / "heatmaps" / "good" / "000.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    refused(tmp_path, "train_pc", said="did not write")


def test_what_an_interrupted_run_left_is_replaced(workplace):
    shutil.rmtree(workplace / "result")
    path = workplace / "data/belt/test/rope/003.png"
    whole = path.read_bytes()
    truncate(path)
    refusal("train_pc", *small_flags(workplace, "train_pc"), "--save-maps", "--batch-size", 2)
    folder = workplace / "result" / "belt" / "pc"
    assert (folder / "anomaly_maps").exists() and not (folder / "metrics.json").exists()
    path.write_bytes(whole)
    succeed(workplace, "train_pc", "--save-maps")
    assert (folder / "metrics.json").exists()


# The system's failures


def test_read_only_folder(workplace, monkeypatch):
    (workplace / "models" / "belt").chmod(0o555)
    if os.access(workplace / "models" / "belt", os.W_OK):  # root may write anywhere
        access = os.access
        models = str(workplace / "models" / "belt")
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != models and access(path, mode))
    try:
        refused(workplace, "train_pc", said=["models/belt", "written"], code=1)
    finally:
        (workplace / "models" / "belt").chmod(0o755)


def test_full_disk(workplace):
    """No file may grow beyond 2 KB: the checkpoint of 18 KB cannot be written."""
    with small_files(2000):
        refused(workplace, "train_pc", said="File too large", code=1)


def test_out_of_memory(capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: torch.empty(10**15))
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["error: out of memory; lower --batch-size or --image-size"]


@pytest.mark.parametrize("name", ["/torch_7_1_0", "</torch_7_1_0>"])
def test_no_shared_memory_for_the_readers(capsys, name):
    """A container has 64 MB by default."""

    def main():
        raise RuntimeError(f"unable to allocate shared memory(shm) for file {name}: No space left on device (28)")

    with pytest.raises(SystemExit) as end:
        run(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and "/dev/shm" in line and "--workers" in line


def test_a_mistake_of_the_program_leaves_no_process_behind():
    """At the end of the program they would be waited for."""
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    worker = context.Process(target=time.sleep, args=(60,))
    worker.start()
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    worker.join(10)
    assert worker.exitcode not in (None, 0)


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
def test_mistakes_of_the_program_keep_their_traceback(error):
    def fail():
        raise error("a bug")

    with pytest.raises(error):
        run(fail)


def test_warnings_are_one_line(capsys):
    with pytest.raises(SystemExit):
        run(lambda: warnings.warn("odd\nbut possible", stacklevel=1))
    assert capsys.readouterr().err == "warning: odd but possible\n"
