"""The branches and their fusion against NumPy, SciPy and scikit-learn on fresh random data."""

import math

import cv2
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from stand_in import Batches, StandIn, close
from threadpoolctl import threadpool_limits
from torch import nn

from benchmarks import reference
from models import MACLU, USAD, Branch, MA2Patch, PatchCore
from models.branches.calibration import calibrate
from models.branches.gaussian import Gaussian, RunningMoments
from models.branches.ma_clu import _foreground_and_background
from models.branches.patch_store import PatchStore
from models.networks.backbones import BackboneSpec, build_backbone
from utils.errors import InputError

SIZES = {"ma_clu": 64, "ma2patch": 96, "pc": 80}


def random_images(count: int, size: int, seed: int) -> torch.Tensor:
    """Blocky noise: images that differ more than by pixel noise, which networks would average out."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="nearest") + 0.2 * torch.randn(
        count, 3, size, size, generator=generator
    )


def backbones() -> dict[str, nn.Module]:
    networks = {
        "ma_clu": ("tokens", "test_vit"),
        "ma2patch": ("tokens", "test_vit3"),
        "pc": ("maps", "test_resnet"),
    }
    return {
        name: build_backbone(BackboneSpec(kind, network, SIZES[name], weights="random", seed=7))
        for name, (kind, network) in networks.items()
    }


def fitted_branches(networks: dict[str, nn.Module], batch_size: int) -> list[Branch]:
    branches = [
        MACLU(networks["ma_clu"]),
        MA2Patch(networks["ma2patch"], covariance="ledoit-wolf"),
        PatchCore(networks["pc"], coreset_ratio=0.05),
    ]
    for seed, branch in enumerate(branches):
        count = 9 if branch.name == "pc" else 90  # more images than the networks have channels (64 and 96)
        branch.fit(Batches.of(random_images(count, branch.image_size, seed), batch_size))
    return branches


@pytest.fixture(scope="module")
def usad() -> USAD:
    return USAD(fitted_branches(backbones(), batch_size=16))


@pytest.fixture(scope="module")
def test_images() -> torch.Tensor:
    return random_images(5, max(SIZES.values()), seed=99)


# The method again: fitted by scikit-learn, scored by the benchmark's plain loop, one image at a time, in float64.


def stretched(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of a map [h, w], enlarging, with half-pixel centres and clamped edges."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def shrunk(image: torch.Tensor, size: int) -> torch.Tensor:
    """Antialiased resize of [3, S, S] by Pillow."""
    channels = [Image.fromarray(channel).resize((size, size), Image.Resampling.BILINEAR) for channel in image.numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))


def seen(network: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Class and patch tokens, or patch features twice, of an image [3, S, S]."""
    first, second = (output.double() for output in network(image[None]))
    if first.dim() == 2:
        return [first[0], second[0]]
    return [reference.patch_features(first, second)] * 2


def gaussian(vectors: np.ndarray, covariance: np.ndarray) -> dict[str, np.ndarray]:
    return {"mean": vectors.mean(0), "inverse": np.linalg.inv(covariance + 1e-6 * np.eye(len(covariance)))}


def plain_states(networks: dict[str, nn.Module]) -> dict[str, dict]:
    """What the branches learn from the images of `fitted_branches`."""
    images = {name: random_images(9 if name == "pc" else 90, SIZES[name], seed) for seed, name in enumerate(SIZES)}
    found = {name: [seen(networks[name], image) for image in images[name]] for name in SIZES}
    cls = torch.stack([cls for cls, _ in found["ma_clu"]]).numpy()
    kmeans = KMeans(2, random_state=42).fit(torch.cat([patches for _, patches in found["ma_clu"]]).float().numpy())
    foreground = int(np.argmin(np.bincount(kmeans.labels_)))
    means = torch.stack([patches.mean(0) for _, patches in found["ma2patch"]]).numpy()
    patches = torch.cat([patches for _, patches in found["pc"]])
    width = johnson_lindenstrauss_min_dim(len(patches), eps=0.9)
    assert width < patches.shape[1]  # otherwise there would be no projection to test
    projected = torch.from_numpy(SparseRandomProjection(eps=0.9, random_state=22).fit_transform(patches.numpy()))
    return {
        "ma_clu": {**gaussian(cls, np.cov(cls.T)), "centers": kmeans.cluster_centers_[[foreground, 1 - foreground]]},
        "ma2patch": gaussian(means, LedoitWolf().fit(means).covariance_),
        "pc": {"bank": patches[reference.sampled(projected, int(0.05 * len(patches)))]},
    }


def plain_part(name: str, network: nn.Module, state: dict, image: torch.Tensor) -> tuple[float, np.ndarray]:
    """Score and map of an image of any size."""
    cls, patches = seen(network, shrunk(image, SIZES[name]))
    if name == "pc":
        return reference.patchcore(patches, state["bank"], SIZES[name])
    if name == "ma_clu":
        return reference.ma_clu(cls.numpy(), patches.numpy(), state, SIZES[name])
    return reference.ma2patch(patches.numpy(), state, SIZES[name])


def test_fusion_agrees_with_a_plain_loop_in_double_precision(usad, test_images):
    networks = {branch.name: branch.backbone for branch in usad.branches}
    states, found = plain_states(networks), usad.predict_parts(test_images)
    for row, image in enumerate(test_images):
        product, fused = 1.0, 0.0
        for name, weight in {"ma_clu": 0.01, "ma2patch": 0.0, "pc": 1.0}.items():
            score, anomaly_map = plain_part(name, networks[name], states[name], image)
            anomaly_map = stretched(anomaly_map, 96)
            assert float(found[name][0][row]) == pytest.approx(score, rel=1e-4), name
            assert close(found[name].scaled()[row], anomaly_map, 1e-4), name
            product = product * anomaly_map
            fused += weight * score
        assert float(found["fusion"][0][row]) == pytest.approx(fused + product.max(), rel=1e-4)
        assert close(found["fusion"][1][row], gaussian_filter(product, 1, mode="mirror", truncate=2), 2e-4)
    scores, maps, *_ = usad.predict(test_images)
    assert scores.shape == (5,) and maps.shape == (5, 96, 96)
    assert scores.dtype == torch.float64 and maps.dtype == torch.float32


def test_fusions_that_cannot_be_are_refused(usad, tmp_path):
    """A mistyped name would be ignored in silence, and of two parts of one name one would be lost."""
    *two, pc = usad.branches
    for branches, settings, words in (
        ([], {}, "at least one branch"),
        ([*two, pc, pc], {}, "'pc' is the name of 2 of fusion, ma_clu, ma2patch, pc, pc"),
        (two, {"score_weights": {"ma_clu": "1"}}, "are finite numbers, not '1'"),
        (two, {"lambda_map": 10**400}, "are finite numbers, not 10"),
        (two, {"lambda_map": float("nan")}, "are finite numbers, not nan"),
        (two, {"score_weights": {"pc": 1.0}}, "score_weights: branch 'pc' is not one of ma_clu, ma2patch$"),
    ):
        with pytest.raises(InputError, match=words):
            USAD(branches, **settings)
    with pytest.raises(InputError, match=r"weights: branch 'pcc' is not one of ma_clu, ma2patch, pc$"):
        USAD.load(tmp_path, weights={"pcc": "wide.pth"})
    with pytest.raises(InputError, match="device gpu: "):
        USAD.load(tmp_path, "gpu")


def test_batch_size_does_not_matter(usad, test_images):
    others = USAD(fitted_branches({branch.name: branch.backbone for branch in usad.branches}, batch_size=1))
    together = usad.predict_parts(test_images)
    for row in range(len(test_images)):
        alone = others.predict_parts(test_images[row : row + 1])
        for name, part in together.items():
            assert float(alone[name].scores) == pytest.approx(float(part.scores[row]), rel=1e-4), name
            assert close(alone[name].maps[0], part.maps[row], 1e-4), name
            assert close(alone[name].scaled()[0], part.scaled()[row], 1e-4), name


@pytest.mark.parametrize("index", range(3))
def test_save_and_load_bit_for_bit(usad, tmp_path, monkeypatch, index):
    branch = usad.branches[index]
    branch.training = {"images": 90, "files_digest": "abc"}
    images = random_images(4, branch.image_size, seed=5)
    monkeypatch.setattr(branch, "calibration", calibrate(branch, Batches.of(images, 2)))
    paths = [tmp_path / f"{number}.safetensors" for number in range(9)]
    for path in paths[1:]:  # the order of safetensors' metadata is a toss-up where there are two keys
        branch.save(path)
    loaded = type(branch).load(paths[1])
    loaded.save(paths[0])
    assert len({path.read_bytes() for path in paths}) == 1
    assert (loaded.calibration, loaded.training) == (branch.calibration, branch.training)
    assert loaded.settings() == branch.settings()
    ours, theirs = loaded.predict(images), branch.predict(images)
    assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.maps, theirs.maps)
    assert torch.equal(ours.scaled(), theirs.scaled())


def coarse(maps) -> np.ndarray:
    """Means of squares of 4 x 4 pixels [B, S/4, S/4] of maps [B, S, S]."""
    maps = np.asarray(maps, np.float64)
    count, side = len(maps), maps.shape[-1] // 4
    return maps.reshape(count, side, 4, side, 4).mean((2, 4))


def highest_hundredth(maps: np.ndarray) -> np.ndarray:
    """Mean of the highest hundredth of each map's values."""
    values = np.sort(maps.reshape(len(maps), -1), 1)
    return values[:, -max(1, round(values.shape[1] / 100)) :].mean(1)


def normal_field(statistics, image_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What a map is standardised by at each of its pixels: mean and deviation [size, size]."""
    edge = np.minimum(np.arange(image_size), np.arange(image_size)[::-1])
    distance = np.minimum.outer(edge, edge)
    shift = between_steps([*statistics["border_shift"], 0.0], distance)
    scale = between_steps([*statistics["border_scale"], 1.0], distance)
    mean = statistics["map_mean"] + statistics["map_std"] * shift
    return stretched(mean, size), stretched(statistics["map_std"] * scale, size)


def between_steps(values: list[float], distance: np.ndarray) -> np.ndarray:
    """The values at pixels, on the straight lines through those in the middles of steps of 4 pixels."""
    outside = 2 * values[0] - values[1]  # the first line goes on to the border
    return np.interp(distance, 4 * np.arange(-1, len(values)) + 1.5, [outside, *values])


def test_statistics_on_held_out_images(usad):
    branch = usad.branches[2]
    images = random_images(6, branch.image_size, seed=6)
    statistics = calibrate(branch, Batches.of(images, 4))
    scores, maps, *_ = branch.predict(images)
    maps = coarse(maps)
    mean, deviation = coarse(normal_field(statistics, branch.image_size, branch.image_size))
    tops = highest_hundredth((maps - mean) / deviation)
    reach = len(statistics["border_shift"])
    interior = maps[:, reach:-reach, reach:-reach]
    expected = [scores.mean(), scores.std(), tops.mean(), tops.std(ddof=1), interior.mean(), interior.std()]
    found = [statistics[f"{part}_{figure}"] for part in ("score", "top", "map") for figure in ("mean", "std")]
    assert statistics["images"] == 6 and reach > 2
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_held_out_images_that_are_all_the_same_are_told(usad, capsys):
    branch = usad.branches[2]
    calibrate(branch, Batches.of(random_images(1, branch.image_size, seed=6).expand(4, -1, -1, -1), 4))
    assert "branch 'pc' gives all held-out images one score" in capsys.readouterr().err


def test_standardized_fusion(usad, test_images, monkeypatch):
    branches = usad.branches
    for branch in branches:
        images = random_images(6, branch.image_size, seed=6)
        monkeypatch.setattr(branch, "calibration", calibrate(branch, Batches.of(images, 4)))
    parts = USAD(branches, fusion="standardized").predict_parts(test_images)
    deviations, tops, maps = [], [], []
    for branch in branches:
        raw, statistics = parts[branch.name], branch.calibration
        if branch.name == "ma_clu":
            deviation = (raw.scores.double() - statistics["score_mean"]) / statistics["score_std"]
            deviations.append((deviation - 3 / math.sqrt(6)) / (1 + 3 / math.sqrt(12)))  # six images
        mean, deviation = normal_field(statistics, branch.image_size, 96)
        maps.append((raw.maps.double().numpy() - mean) / deviation)
        tops.append((highest_hundredth(coarse(maps[-1])) - statistics["top_mean"]) / statistics["top_std"])
    deviations.append((tops[0] + tops[1] + 16 * tops[2]) / 18)
    surprises = [-2 * scipy.stats.norm.logsf(np.asarray(deviation)) for deviation in deviations]
    np.testing.assert_allclose(parts["fusion"].scores, np.linalg.norm(surprises, axis=0) ** 0.5, rtol=1e-4)
    assert close(parts["fusion"].maps, (maps[0] + maps[1] + 16 * maps[2]) / 18, 1e-4)
    monkeypatch.setattr(branches[1], "calibration", None)
    with pytest.raises(InputError, match="--holdout-ratio"):
        USAD(branches, fusion="standardized")


# Gaussian


def vectors(count: int, width: int, seed: int = 3) -> np.ndarray:
    """Correlated vectors far from the origin, where one-pass formulas lose their digits."""
    rng = np.random.default_rng(seed)
    return 1e4 + rng.normal(size=(count, width)) @ rng.normal(size=(width, width))


def moments_of(data: np.ndarray, batch_size: int = 100, estimator: str = "empirical") -> RunningMoments:
    moments = RunningMoments(estimator)
    for part in torch.from_numpy(data).split(batch_size) if len(data) else ():
        moments.update(part)
    return moments


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_running_moments(batch_size):
    data = vectors(60, 12)
    moments = moments_of(data, batch_size)
    assert moments.count == 60
    np.testing.assert_allclose(moments.mean, data.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance(), np.cov(data.T), rtol=1e-9, atol=1e-9)


def test_merged_moments():
    data, merged = vectors(50, 8), RunningMoments()
    for part in (data[:13], data[:0], data[13:]):
        merged.merge(moments_of(part).state())
    np.testing.assert_allclose(merged.covariance(), np.cov(data.T), rtol=1e-9, atol=1e-9)


def test_mahalanobis_distance():
    data, points = vectors(40, 6), vectors(5, 6, seed=4)
    expected = [reference.mahalanobis(point, **gaussian(data, np.cov(data.T))) for point in points]
    found = moments_of(data).finish().distance(torch.from_numpy(points))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_ledoit_wolf():
    data = vectors(10, 16).astype(np.float32)
    expected = LedoitWolf().fit(data.astype(np.float64)).covariance_
    np.testing.assert_allclose(moments_of(data, 3, "ledoit-wolf").finish().covariance, expected, rtol=1e-9)


def test_fewer_images_than_channels_warns_and_works():
    with pytest.warns(UserWarning, match=r"5 training images for 16 channels.*--covariance ledoit-wolf"):
        gaussian = moments_of(vectors(5, 16)).finish()
    distances = gaussian.distance(torch.from_numpy(vectors(3, 16, seed=8)))
    assert torch.isfinite(distances).all() and (distances > 100).all()  # 1e-6 in the null space


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("count", "estimator"), [(17, "empirical"), (5, "ledoit-wolf")])
def test_no_warning_where_the_covariance_has_full_rank(count, estimator):
    moments_of(vectors(count, 16), estimator=estimator).finish()


def test_one_image_has_no_covariance():
    with pytest.raises(InputError, match="1 training image"):
        moments_of(np.ones((1, 4))).finish()


def test_a_stored_inverse_is_used_as_it_is():
    inverse = 3 * torch.eye(4)
    gaussian = Gaussian(torch.zeros(4), torch.eye(4), inverse)
    assert float(gaussian.distance(torch.tensor([1.0, 0, 0, 0]))) == pytest.approx(math.sqrt(3))


# Patches


def stored(patches: torch.Tensor, budget: float, batch_size: int) -> torch.Tensor:
    """What a store with a budget of `budget` numbers keeps of patches [n, N, D] that arrive in batches."""
    store = PatchStore(len(patches), budget=budget * 4 / 1e9)
    for index in torch.arange(len(patches)).split(batch_size):
        store.add(patches[index], index)
    assert store.rows().untyped_storage().nbytes() <= 4 * budget
    return store.rows()


def test_patch_store_below_its_budget_keeps_all_in_order():
    patches = torch.randn(5, 6, 4)
    assert torch.equal(stored(patches, 5 * 6 * 4.1, batch_size=2), patches.reshape(-1, 4))


@pytest.mark.parametrize("share", [4.5, 1.0, 0.6])
def test_patch_store_above_its_budget_keeps_as_many_of_each_image(share):
    patches = torch.arange(7 * 10, dtype=torch.float32).view(7, 10, 1).expand(-1, -1, 4)
    budget = int(7 * share) * 4
    rows = stored(patches, budget, batch_size=3)
    counts = (rows[:, 0] // 10).long().bincount(minlength=7)
    assert len(rows.unique(dim=0)) == len(rows) == int(7 * share)  # none twice
    assert set(counts.tolist()) <= {math.floor(share), math.ceil(share)}
    assert torch.equal(rows, rows.sort(dim=0).values)
    assert torch.equal(rows, stored(patches, budget, batch_size=1))


def test_patch_stores_of_two_processes_keep_what_one_keeps():
    patches, index = torch.randn(7, 10, 4), torch.arange(7)
    stores = [PatchStore(7, budget=7 * 4 * 4 * 4.5 / 1e9) for _ in range(3)]
    for store, part in zip(stores, (index[:3], index[3:], index[:0]), strict=True):
        if len(part):
            store.add(patches[part], part)
    for other in stores[1:]:
        stores[0].merge(other.state())
    assert torch.equal(stores[0].rows(), stored(patches, 7 * 4 * 4.5, batch_size=2))


@pytest.mark.parametrize("few", [1, 4])
@pytest.mark.parametrize("budget", [8.0, 9 * 6 * 20 * 5 * 4 / 1e9])  # the second: 6 patches an image
def test_a_patch_store_takes_images_of_few_and_of_many_patches(few, budget):
    frames = 20
    store = PatchStore(9 * frames, budget)
    for numbers in torch.arange(9 * frames).split(9):  # tiles; all but the last show little of a region of interest
        store.add(torch.randn(8, few, 5), numbers[:8])
        store.add(torch.randn(1, 64, 5), numbers[8:])
    assert len(store.rows()) == frames * (8 * few + (64 if budget > 1 else 6))
    assert float(store.weights().sum()) == pytest.approx(frames * (8 * few + 64))


def patchcore_with(bank: np.ndarray) -> PatchCore:
    branch = PatchCore(StandIn(16, (2, 2), bank.shape[1]), neighbors=3)
    branch.load_state({"bank": torch.from_numpy(bank).float()})
    return branch


@pytest.mark.parametrize("entries", [1, 2, 3, 4])
def test_patchcore_with_a_tiny_bank(entries):
    rng = np.random.default_rng(entries)
    bank, patches = rng.normal(size=(entries, 8)), rng.normal(size=(3, 4, 8))
    scores, maps, *_ = patchcore_with(bank).score(torch.from_numpy(patches).float())
    assert torch.isfinite(maps).all()
    for score, image in zip(scores, patches, strict=True):
        distances = np.linalg.norm(image[:, None] - bank, axis=2)
        largest, strange = distances.min(1).max(), distances.min(1).argmax()
        order = np.linalg.norm(bank - bank[distances[strange].argmin()], axis=1).argsort()[1:3]
        weight = 1.0
        if entries > 1:
            reach = np.exp(np.linalg.norm(image[strange] - bank[order], axis=1) / math.sqrt(8)).sum()
            weight -= math.exp(largest / math.sqrt(8)) / reach
        assert float(score) == pytest.approx(weight * largest, rel=1e-5)
        assert entries < 3 or 0.5 <= weight < 1


def test_patchcore_with_copies_in_its_bank():
    patches = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    scores = patchcore_with(np.zeros((3, 8))).score(patches).scores
    # All three entries are as far: the weight is 1 - 1/2.
    np.testing.assert_allclose(scores, patches.norm(dim=2).amax(1) / 2, rtol=1e-5)
    flat = patchcore_with(patches[0].double().numpy()).score(patches[:1])
    assert float(flat[0]) == 0 and float(flat[1].abs().max()) == 0  # nothing strange, and no division by zero


def test_patchcore_refuses_an_empty_bank():
    branch = PatchCore(StandIn(16, (2, 2), 6), coreset_ratio=0.005)
    branch.extract = lambda images: images.flatten(2).mT
    with pytest.raises(InputError, match=r"--coreset-ratio 0\.005 of 128 patches"):
        branch.fit(Batches.of(torch.randn(2, 4, 8, 8)))


@pytest.mark.parametrize("rounding", [0, 1e-7])
def test_training_images_all_alike_are_refused(rounding):
    branch = MACLU(StandIn(16, (2, 2), 6))
    tokens = 1 + rounding * torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
    branch.backbone.forward = lambda images: (torch.ones(len(images), 6), tokens)
    with pytest.raises(InputError, match="identical"), pytest.warns(UserWarning, match="channels"):
        branch.fit(Batches.of(torch.zeros(4, 3, 16, 16)))


def test_clusters_do_not_depend_on_the_number_of_threads():
    patches = torch.randn(30_000, 32, generator=torch.Generator().manual_seed(2))
    patches[:12_000] += 0.8
    found = set()
    for threads in (1, 2, 8, 8, 8):
        with threadpool_limits(threads, user_api="openmp"):
            found.add(_foreground_and_background(patches.clone(), torch.ones(30_000))[0].numpy().tobytes())
    assert len(found) == 1


def test_all_coal_keeps_its_confidence():
    branch = MACLU(StandIn(16, (2, 2), 6))
    confidence = torch.tensor([[1.5, 2.0, 1.2, 1.1], [1.5, 2.0, 0.4, 0.8], [1.14, 1.0, 0.2, 0.2]])
    expected = torch.tensor([[1.5, 2.0, 1.2, 1.1], [0.6, 0.6, 0.4, 0.8], [1.14, 1.0, 0.2, 0.2]])
    assert torch.allclose(branch.without_coal(confidence), expected)
