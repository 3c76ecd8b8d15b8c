"""Every stored number of the authors' program, computed again from the same inputs."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.random_projection import SparseRandomProjection
from stand_in import Batches, StandIn, close
from tiny import golden

from datasets.loading import mask_to_tensor, to_tensor
from models import MACLU, USAD, MA2Patch, Part, PatchCore
from models.branches.coreset import greedy_k_center
from models.branches.patchcore import patch_features
from models.branches.postprocess import resize_images, resize_maps


class Given:
    """A batch as the stand-in networks take it: tokens or layer maps; `to` leaves them where they are."""

    def __init__(self, *features):
        self.features = features

    def to(self, *_, **__):
        return self.features


def token_branch(branch_class):
    """A branch fitted on the stored training tokens, the features of the test images, and all stored numbers."""
    data = golden(branch_class.name)
    tokens = torch.from_numpy(data["train_tokens"])
    size = int(data["image_size"])
    side = int((tokens.shape[1] - 1) ** 0.5)
    branch = branch_class(StandIn(size, (side, side), tokens.shape[2]))
    parts = zip(tokens.split(7), torch.arange(len(tokens)).split(7), strict=True)
    branch.fit(Batches(({"image": Given(t[:, 0], t[:, 1:]), "index": index} for t, index in parts), len(tokens)))
    test = torch.from_numpy(data["test_tokens"])
    return branch, (test[:, 0], test[:, 1:]), data


@pytest.fixture
def ma_clu():
    return token_branch(MACLU)


@pytest.fixture
def ma2patch():
    return token_branch(MA2Patch)


def test_ma_clu_fit(ma_clu):
    branch, _, data = ma_clu
    foreground = int(data["foreground_cluster"])
    centers = data["cluster_centers"][[foreground, 1 - foreground]]
    assert close(branch.centers, centers, 1e-5)
    assert close(branch.gaussian.mean, data["mean"], 1e-5)
    assert close(branch.gaussian.covariance, data["cov"], 1e-5)
    assert close(branch.gaussian.inverse, data["inv_cov"], 1e-3)
    assert branch.threshold == float(data["threshold"])


def test_ma_clu_scores_and_maps(ma_clu):
    branch, features, data = ma_clu
    part = branch.score(features)
    np.testing.assert_allclose(branch.confidence(features[1]), data["patch_confidence"], rtol=1e-3)
    np.testing.assert_allclose(part.scores, data["score"], rtol=1e-3)
    assert close(part.scaled(), data["anomaly_map"], 1e-3)


def test_ma2patch_fit(ma2patch):
    branch, _, data = ma2patch
    assert close(branch.gaussian.mean, data["mean"], 1e-5)
    assert close(branch.gaussian.covariance, data["cov"], 1e-5)


def test_ma2patch_scores_and_maps(ma2patch):
    branch, (_, tokens), data = ma2patch
    part = branch.score(tokens)
    assert close(branch.contribution(tokens), data["contribution"], 1e-3)
    np.testing.assert_allclose(part.scores, data["score"], rtol=1e-3)
    assert close(part.scaled(), data["anomaly_map"], 1e-3)


@pytest.fixture
def patchcore():
    """PatchCore fitted on the stored training maps, with the ratio that gives the stored bank's size."""
    data = golden("patchcore")
    layers = torch.from_numpy(data["layer2"]), torch.from_numpy(data["layer3"])
    train = int(data["n_train"])
    dim = layers[0].shape[1] + layers[1].shape[1]
    ratio = (int(data["coreset_size"]) + 0.5) / (train * 256)
    branch = PatchCore(
        StandIn(int(data["image_size"]), (16, 16), dim), coreset_ratio=ratio, neighbors=int(data["k_nearest"])
    )
    branch.fit(Batches([{"image": Given(*(layer[:train] for layer in layers)), "index": torch.arange(train)}], train))
    return branch, patch_features([layer[train:] for layer in layers]), data


def test_patchcore_features_and_bank(patchcore):
    branch, _, data = patchcore
    layers = torch.from_numpy(data["layer2"]), torch.from_numpy(data["layer3"])
    features = patch_features(layers)[: int(data["n_train"])].reshape(-1, 32)
    np.testing.assert_allclose(features, data["patch_features"], atol=1e-5)
    index = greedy_k_center(torch.from_numpy(data["patch_features"]), int(data["coreset_size"]), progress=False)
    np.testing.assert_array_equal(index, data["coreset_index"])
    np.testing.assert_allclose(branch.memory_bank.rows, data["patch_features"][data["coreset_index"]], atol=1e-5)


def test_patchcore_scores_and_maps(patchcore):
    branch, features, data = patchcore
    part = branch.score(features)
    np.testing.assert_allclose(part.scores, data["score"], rtol=1e-4)
    # Their blur is Pillow's, through 8 bits; ours is a true Gaussian.
    np.testing.assert_allclose(part.scaled(), data["anomaly_map"], atol=0.01)


def test_coreset_after_projection():
    data = golden("coreset")
    chosen = greedy_k_center(torch.from_numpy(data["projected"]), int(data["coreset_size"]), progress=False)
    np.testing.assert_array_equal(chosen, data["coreset_index"])
    drawn = SparseRandomProjection(eps=0.9, random_state=22).fit(np.zeros((1500, int(data["feature_width"]))))
    assert drawn.n_components_ == data["projected"].shape[1]


def test_preprocessing():
    data = golden("preprocess")
    image, mask = Image.fromarray(data["image"]), Image.fromarray(data["mask"])
    np.testing.assert_allclose(to_tensor(image, 56, "bilinear"), data["train_56"], atol=1e-5)
    test = to_tensor(image, 58, "bicubic")
    np.testing.assert_allclose(test, data["test_58"], atol=1e-5)
    for size in (50, 34):
        np.testing.assert_allclose(resize_images(test[None], size)[0], data[f"test_58_to_{size}"], atol=1e-5)
    np.testing.assert_array_equal(mask_to_tensor(np.asarray(mask) >= 128, 58), data["mask_58"] > 0.5)


def test_fusion_of_stored_parts(ma_clu, ma2patch, patchcore):
    data, parts = golden("fusion"), {}
    for name, file in (("ma_clu", "ma_clu"), ("ma2patch", "ma2patch"), ("pc", "patchcore")):
        scores, maps = (torch.from_numpy(golden(file)[part]) for part in ("score", "anomaly_map"))
        parts[name] = Part(scores, resize_maps(maps, int(data["size"])))
    usad = USAD([ma_clu[0], ma2patch[0], patchcore[0]], lambda_map=float(data["lambda_map"]))
    assert usad.rule.score_weights["ma_clu"] == float(data["lambda_obj"])
    scores, maps = usad.rule.fuse(parts)
    np.testing.assert_allclose(scores, data["score"], rtol=1e-5)
    np.testing.assert_allclose(maps, data["fused_map"], atol=1e-6)


def test_fusion_of_own_parts(ma_clu, ma2patch, patchcore):
    data = golden("fusion")
    (clu, clu_features, _), (attribution, (_, tokens), _), (pc, pc_features, _) = ma_clu, ma2patch, patchcore
    parts = {"ma_clu": clu.score(clu_features), "ma2patch": attribution.score(tokens), "pc": pc.score(pc_features)}
    rule = USAD([clu, attribution, pc]).rule
    scores, maps = rule.fuse({name: part.resized(int(data["size"])) for name, part in parts.items()})
    assert close(maps, data["fused_map"], 0.015)
    np.testing.assert_allclose(scores, data["score"], rtol=2e-3)
