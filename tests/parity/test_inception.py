"""The metrics agree with torch-fidelity on the same random Inception weights and the same images."""

import jax
import numpy as np
import pytest
import torch

from tests.parity.fidelity import import_torch_fidelity
from trm_diffusion.jobs.evaluate_images import evaluate_images, make_reference
from trm_diffusion.models.inception import inception_features, random_state
from trm_diffusion.weights.inception import load_inception

fidelity = import_torch_fidelity()


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = {name: torch.from_numpy(value) for name, value in random_state(0).items()}
    state["fc.weight"] *= 30  # logits that differ between images, for an inception score well above 1
    torch.save(state, path)
    return str(path)


def images(seed: int, count: int) -> np.ndarray:
    """Coarse random colours [N, 32, 32, 3], similar enough that some are neighbours and some are not."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


class TensorImages(torch.utils.data.Dataset):
    def __init__(self, images_nhwc: np.ndarray):
        self._images = torch.from_numpy(images_nhwc.transpose(0, 3, 1, 2))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._images[index]


def extractor(weights_path):
    features = ["2048", "logits_unbiased"]
    return fidelity.FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=weights_path)


@pytest.mark.parametrize("shape", [(32, 32), (300, 256)])
def test_features_agree(weights_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    theirs, hooked = extractor(weights_path), []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _input, output: hooked.append(output))
    pool, logits = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    spatial = hooked[0][:, :7].permute(0, 2, 3, 1).reshape(2, 2023)

    weights, _ = load_inception(weights_path)
    ours = jax.jit(inception_features)(weights, pixels)
    for found, expected in zip(ours, (pool, spatial, logits), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_metrics_agree(weights_path, tmp_path):
    samples, reference = images(0, 24), images(1, 30)
    theirs = fidelity.calculate_metrics(
        input1=TensorImages(samples),
        input2=TensorImages(reference),
        fid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=weights_path,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        batch_size=8,
        samples_shuffle=False,
        isc_splits=1,
    )

    np.savez(tmp_path / "samples.npz", arr_0=samples)
    np.savez(tmp_path / "real.npz", arr_0=reference)
    make_reference(str(tmp_path / "real.npz"), weights_path, str(tmp_path / "reference.npz"))
    ours = evaluate_images(str(tmp_path / "samples.npz"), str(tmp_path / "reference.npz"), weights_path)
    names = {
        "fid": fidelity.KEY_METRIC_FID,
        "inception_score": fidelity.KEY_METRIC_ISC_MEAN,
        "precision": fidelity.KEY_METRIC_PRECISION,
        "recall": fidelity.KEY_METRIC_RECALL,
    }
    # Otherwise the comparison would show nothing.
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1 and ours["inception_score"] > 1.1
    for name, key in names.items():
        np.testing.assert_allclose(ours[name], theirs[key], rtol=1e-3, err_msg=name)
