"""Numbers at their limits: every score and map is finite, or the run is refused with the reason."""

import itertools

import numpy as np
import pytest
import torch
from machine import needs_cuda
from PIL import Image
from safetensors.torch import save_file
from stand_in import StandIn, noise
from tiny import SMALL_NETWORKS, draw_category, draw_frame, read_rows, refusal, run_in_process, small_flags, succeed

from models import MACLU, USAD, MA2Patch, PatchCore
from models.branches.gaussian import Gaussian, RunningMoments
from models.networks.backbones import BackboneSpec, build_backbone
from models.networks.libraries import full_network
from models.networks.weights import random_state_dict

ODD = {
    "black": np.zeros((56, 72, 3), np.uint8),
    "white": np.full((56, 72, 3), 255, np.uint8),
    "grey": np.full((56, 72, 3), 127, np.uint8),
    "saturated": np.tile(np.array([255, 0, 0], np.uint8), (56, 72, 1)),
    "checks": np.tile(np.array([[0, 255], [255, 0]], np.uint8)[..., None], (28, 36, 3)),
    "one pixel": np.zeros((1, 1, 3), np.uint8),
}


@pytest.fixture(scope="module")
def usad(trained):
    return USAD.load(trained / "models" / "belt")


@pytest.mark.parametrize("name", ODD)
def test_odd_frames_get_finite_scores_and_maps(usad, name):
    (prediction,) = usad([ODD[name]])
    values = [(prediction.score, prediction.map), *prediction.branches.values()]
    assert all(np.isfinite(score) and np.isfinite(found).all() for score, found in values)
    assert prediction.map.shape == ODD[name].shape[:2] and len(values) == 4


TRAINING = {
    "identical": lambda frame: [frame] * 6,
    "identical and black": lambda frame: [ODD["black"]] * 6,
    "black and white": lambda frame: [ODD["black"], ODD["white"]] * 3,
    "one": lambda frame: [frame],
    "one black": lambda frame: [ODD["black"]],
}
REFUSED = set(itertools.product(("train_ma_clu", "train_ma2patch"), ("one", "one black")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SMALL_NETWORKS)
@pytest.mark.parametrize("kind", TRAINING)
def test_odd_training_images(tmp_path, script, kind):
    """Results are finite numbers (evaluate refuses others), or one line says why there are none."""
    belt = draw_category(tmp_path / "data" / "belt", train=0)
    for index, frame in enumerate(TRAINING[kind](draw_frame(np.random.default_rng(0), 72, 56))):
        Image.fromarray(frame).save(belt / "train" / "good" / f"{index:03d}.png")
    for name, odd in ODD.items():
        Image.fromarray(odd).save(belt / "test" / "good" / f"{name}.png")
    finished = run_in_process(script, *small_flags(tmp_path, script), "--train-ratio", 1, "--no-images")
    said = finished.err.splitlines()
    if finished.code == 0:
        assert (script, kind) not in REFUSED and all(line.startswith("warning: ") for line in said)
        return
    assert finished.code == 2 and said[-1].startswith("error: ")
    assert (script, kind) in REFUSED and "1 training image" in said[-1], said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("script", SMALL_NETWORKS)
def test_a_network_that_gives_no_numbers(tmp_path, script, value):
    draw_category(tmp_path / "data" / "belt")
    name = "test_resnet" if script == "train_pc" else "test_vit"
    state = random_state_dict(lambda: full_network(name), 22)
    weights = [tensor for key, tensor in state.items() if key.endswith("weight") and tensor.dim() > 1]
    if np.isfinite(value):  # what it computes overflows
        for weight in weights:
            weight *= value
    else:
        weights[0].view(-1)[0] = value
    save_file(state, tmp_path / "spoilt.safetensors")
    said = refusal(script, *small_flags(tmp_path, script), "--weights", tmp_path / "spoilt.safetensors")
    assert "not finite" in said and "spoilt.safetensors" in said


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_covariance_singular_to_machine_precision(scale, rank):
    generator = torch.Generator().manual_seed(rank)
    vectors = scale * (torch.randn(40, rank, generator=generator) @ torch.randn(rank, 16, generator=generator) + 1)
    fit = RunningMoments()
    fit.update(vectors)
    gaussian = fit.finish()
    far = scale * torch.randn(5, 16, generator=generator).double() * 1e3
    assert torch.isfinite(gaussian.distance(torch.cat([vectors.double(), far]))).all()
    assert torch.isfinite(gaussian.distance(gaussian.mean)) and gaussian.distance(gaussian.mean) < 1e-5


def test_an_inverse_that_rounding_spoils_is_that_of_the_rounded_eigenvalues():
    """Beside a variance of 1e40 the ridge is lost; distances along other axes are those of the ridge alone."""
    covariance = torch.diag(torch.tensor([1e40, 0.0, 0.0], dtype=torch.float64))
    gaussian = Gaussian(torch.zeros(3), covariance)
    distance = gaussian.distance(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
    assert torch.allclose(distance, torch.tensor([1e3, 2e3], dtype=torch.float64), rtol=1e-6)


def is_finite(part) -> bool:
    return bool(torch.isfinite(part.scores).all() and torch.isfinite(part.scaled()).all())


def test_no_patch_in_one_cluster():
    """An image that is all belt, or all coal."""
    branch = MACLU(StandIn(12, (2, 2), 3))
    branch.gaussian = Gaussian(torch.zeros(3), torch.eye(3))
    branch.centers = torch.tensor([[0.0, 0, 0], [9.0, 9, 9]])
    for patches in (torch.zeros(1, 4, 3), torch.full((1, 4, 3), 9.0)):
        assert is_finite(branch.score((torch.zeros(1, 3), patches)))


def test_ma2patch_at_the_mean_itself():
    branch = MA2Patch(StandIn(12, (2, 2), 3))
    branch.gaussian = Gaussian(torch.zeros(3), torch.zeros(3, 3))
    part = branch.score(torch.zeros(1, 4, 3))
    assert is_finite(part) and (part.scaled() == 0).all()


def test_a_bank_of_one_entry_and_copies():
    branch = PatchCore(StandIn(12, (2, 2), 3))
    for bank in (torch.zeros(1, 3), torch.zeros(5, 3)):
        branch.load_state({"bank": bank})
        assert is_finite(branch.score(torch.zeros(1, 4, 3)))


# The same numbers


@pytest.mark.parametrize(("kind", "name", "size"), [("tokens", "test_vit", 96), ("maps", "test_resnet", 64)])
def test_bf16_against_fp32(kind, name, size):
    images = noise(size, 4)
    spec = BackboneSpec(kind, name, size, weights="random")
    exact, rough = (build_backbone(spec, precision=precision) for precision in ("fp32", "bf16"))
    assert rough.spec.precision == "bf16"
    for one, other in zip(exact(images), rough(images), strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).square().mean().sqrt() < 0.03 * one.square().mean().sqrt()


@needs_cuda
def test_a_batch_on_a_gpu_is_one_graph(trained):
    """As usual, captured, replayed, and filled up: the same numbers, and each stage's time is known."""
    usad = USAD.load(trained / "models/belt", "cuda", "fp32")
    images = noise(usad.image_size, 4).cuda()
    first = usad.predict_parts(images)
    for count in (4, 4, 3):
        again = usad.predict_parts(images[:count])
        assert again.keys() == first.keys()
        for name, part in again.items():
            expected = first[name]
            assert torch.allclose(part.scores, expected.scores[:count], rtol=1e-4)
            assert (part.maps - expected.maps[:count]).abs().max() < 1e-4 * expected.maps.abs().max()
    assert usad.passes.obstacle is None and list(usad.passes.graphs) == [4]
    times = [watch.seconds for watch in usad.stopwatches().values()]
    assert all(seconds["score"] > 0 for seconds in times) and all(seconds["extract"] > 0 for seconds in times[1:])


@needs_cuda
def test_fusion_on_a_gpu_writes_what_the_cpu_writes(trained, tmp_path):
    tables = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        flags = ["--device", device, "--precision", "fp32", "--batch-size", 2, "--no-images"]
        succeed(trained, "test_fusion", "--results-dir", folder, *flags)
        tables.append(read_rows(folder / "belt/fusion/scores.csv"))
    cpu, gpu = tables
    assert [row["path"] for row in cpu] == [row["path"] for row in gpu] and len(cpu) > 4
    for part in ("score", "ma_clu", "ma2patch", "pc"):
        assert [float(row[part]) for row in gpu] == pytest.approx([float(row[part]) for row in cpu], rel=1e-3)


@needs_cuda
def test_gpu_against_cpu(trained):
    """fp32 on both: scores agree to 1e-3 of themselves, maps to 1e-3 of their range."""
    images = sorted((trained / "data/belt/test").glob("*/*.png"))
    cpu, gpu = (USAD.load(trained / "models/belt", device, "fp32")(images) for device in ("cpu", "cuda"))
    for one, other in zip(cpu, gpu, strict=True):
        assert other.score == pytest.approx(one.score, rel=1e-3)
        assert np.abs(one.map - other.map).max() < 1e-3 * np.ptp(one.map) + 1e-6
