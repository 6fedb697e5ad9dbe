"""Jobs on image files: evaluation.json, references and comparison pages."""

import json

import jax
import numpy as np
import pytest
from absl import flags

from tests.weights.published import write
from trm_diffusion import main
from trm_diffusion.errors import UserError
from trm_diffusion.jobs.compare import compare
from trm_diffusion.jobs.convert_weights import convert
from trm_diffusion.jobs.evaluate_images import evaluate_images, make_reference
from trm_diffusion.metrics import adm
from trm_diffusion.metrics.image_sets import open_images
from trm_diffusion.models.inception import Features, fold_batch_norms, random_state, state_shapes
from trm_diffusion.weights.inception import load_inception

SIZES = Features(pool=20, spatial=12, logits=10)


def images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return write(tmp_path_factory.mktemp("weights") / "inception.safetensors", random_state(0))


@pytest.fixture
def quick_network(monkeypatch):
    """Replaces the network by a random projection: these tests are about files, not features."""
    matrices = Features(*(np.random.default_rng(0).standard_normal((48, size)) / 7 for size in SIZES))

    def project(weights, batch):
        flat = np.asarray(batch).reshape(len(batch), -1) / 64 - 2
        return Features(*(np.maximum(flat @ matrix, 0).astype(np.float32) for matrix in matrices))

    monkeypatch.setattr(adm, "_forward", project)
    monkeypatch.setattr(adm, "POOL_WIDTH", SIZES.pool)
    monkeypatch.setattr(adm, "SPATIAL_WIDTH", SIZES.spatial)


@pytest.fixture
def files(tmp_path, quick_network, inception):
    np.savez(tmp_path / "real.npz", arr_0=images(0, 90))
    np.savez(tmp_path / "a.npz", arr_0=images(1, 70))
    np.savez(tmp_path / "b.npz", arr_0=images(2, 70) // 2)
    make_reference(str(tmp_path / "real.npz"), inception, str(tmp_path / "reference.npz"))
    return tmp_path


def measure(files, name, inception):
    return evaluate_images(str(files / f"{name}.npz"), str(files / "reference.npz"), inception)


def test_weights_come_back_from_their_file(inception):
    weights, sha256 = load_inception(inception)
    jax.tree.map(np.testing.assert_array_equal, weights, fold_batch_norms(random_state(0)))
    assert len(sha256) == 64


def test_converted_weights_are_read_unless_they_have_changed(inception, tmp_path):
    convert(inception, str(tmp_path / "ours"))
    weights, sha256 = load_inception(str(tmp_path / "ours"))
    jax.tree.map(np.testing.assert_array_equal, weights, load_inception(inception)[0])
    assert sha256 == load_inception(inception)[1]
    tensors = tmp_path / "ours" / "model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is damaged; convert the weights again"):
        load_inception(str(tmp_path / "ours"))


def test_other_weights_are_refused(tmp_path):
    state = {name: np.zeros(shape, np.float32) for name, shape in state_shapes().items() if name.startswith("fc")}
    with pytest.raises(UserError, match="not the FID Inception network: Conv2d_1a_3x3.conv.weight is missing"):
        load_inception(write(tmp_path / "other.safetensors", state))
    with pytest.raises(UserError, match="no such file or directory"):
        load_inception(str(tmp_path / "none.pth"))
    (tmp_path / "torn.safetensors").write_bytes(b"\x90" + bytes(7) + b"{")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_inception(str(tmp_path / "torn.safetensors"))


def test_a_reference_against_its_own_images(files, inception, capsys):
    report = measure(files, "real", inception)
    assert abs(report["fid"]) < 1e-6 and abs(report["sfid"]) < 1e-6
    assert report["precision"] == report["recall"] == 1
    assert report == json.loads((files / "real.evaluation.json").read_text())
    assert report == json.loads(capsys.readouterr().out.splitlines()[-1])
    worse = measure(files, "b", inception)
    assert worse["fid"] > 1 and worse["sfid"] > 1 and worse["precision"] < 1
    for metric, (low, high) in worse["intervals_95"].items():
        assert low <= worse[metric] <= high


def test_a_report_names_everything(files, inception):
    record = {"sampler": "ddpm", "diffusion_steps": 250, "guidance_scale": 1.5, "parameters": "ema 0.9999"}
    (files / "a.sampling.json").write_text(json.dumps(record))
    report = measure(files, "a", inception)
    assert report["num_images"] == 70 and report["fid_name"] == "FID of 70 images, not FID-50K"
    assert report["warnings"] == []
    assert report["sampling"].items() >= record.items() and report["sampling"]["sample_seed"] is None
    protocol = report["protocol"]
    assert len(protocol["reference_sha256"]) == len(protocol["inception_sha256"]) == 64
    assert protocol["reference_images"] == 90 and protocol["precision_recall_dtype"] == "float32"
    assert {"version", "git_commit", "device"} <= report["measured_by"].keys()


def test_too_few_images_are_warned_about(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images(0, 2047))
    assert (
        "2047 images are fewer than 2048 feature dimensions"
        in adm.warnings_about(open_images(str(tmp_path / "a.npz")))[0]
    )
    np.savez(tmp_path / "sorted.npz", arr_0=images(0, 6000), arr_1=np.arange(6000) // 600)
    assert "sorted by class" in adm.warnings_about(open_images(str(tmp_path / "sorted.npz")))[0]


def test_a_reference_holds_the_moments_of_all_images_and_some_images(files, inception, monkeypatch):
    monkeypatch.setattr(adm, "REFERENCE_IMAGES", 20)
    make_reference(str(files / "real.npz"), inception, str(files / "small.npz"))
    small, whole = np.load(files / "small.npz"), np.load(files / "reference.npz")
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_array_equal(small[name], whole[name])
    pool = adm._forward(None, images(0, 90)).pool.astype(np.float64)
    np.testing.assert_allclose(whole["sigma"], np.cov(pool.T, ddof=1), atol=1e-10)
    assert whole["arr_0"].shape == (90, 4, 4, 3) and small["arr_0"].shape == (20, 4, 4, 3)
    assert {image.tobytes() for image in small["arr_0"]} < {image.tobytes() for image in whole["arr_0"]}


def test_files_that_are_no_reference_are_refused(files, inception):
    for name, message in (("a", "has no mu and sigma: make a reference"), ("nowhere", "no such file; make one")):
        with pytest.raises(UserError, match=message):
            evaluate_images(str(files / "a.npz"), str(files / f"{name}.npz"), inception)


def test_what_cannot_be_measured(files, inception, monkeypatch):
    np.savez(files / "three.npz", arr_0=images(1, 3))
    with pytest.raises(UserError, match="three.npz holds 3 images; precision and recall need 4"):
        measure(files, "three", inception)
    project = adm._forward
    monkeypatch.setattr(adm, "_forward", lambda weights, batch: Features(*(1e3 * x for x in project(weights, batch))))
    with pytest.raises(UserError, match="cannot be measured: squared distances overflow float16; use float32"):
        evaluate_images(str(files / "a.npz"), str(files / "reference.npz"), inception, precision_dtype="float16")


def test_a_comparison_is_one_page(files, inception):
    for name in ("a", "b"):
        measure(files, name, inception)
    paths = [str(files / f"{name}.evaluation.json") for name in ("a", "b")]
    compare(paths, str(files / "page.html"))
    page = (files / "page.html").read_text()
    fid = json.loads((files / "b.evaluation.json").read_text())["fid"]
    assert page.count("data:image/png;base64,") == 2 and f"{fid:.4g} " in page and "not FID-50K" in page


@pytest.mark.parametrize(
    "part, field, value",
    [
        (None, "num_images", 69),
        ("protocol", "reference_sha256", "0"),
        ("protocol", "inception_sha256", "0"),
        ("sampling", "diffusion_steps", 50),
        ("sampling", "guidance_scale", 4.0),
        ("sampling", "something_new", 1),
    ],
)
def test_other_protocols_are_not_compared(tmp_path, part, field, value):
    figures = dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall"), 0.5)
    report = figures | {"num_images": 70, "fid_name": "", "intervals_95": dict.fromkeys(figures, [0.4, 0.6])}
    report |= {"images": "a.npz", "protocol": {"reference_sha256": "1", "image_size_cropped_to": None}}
    report["sampling"] = {"diffusion_steps": 250}
    (tmp_path / "a.json").write_text(json.dumps(report))
    (report[part] if part else report)[field] = value
    (tmp_path / "b.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=f"not measured alike and cannot be compared: .*{field}"):
        compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")], str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mode=reference"], "--mode=reference on files needs --images"),
        (["--mode=evaluate", "--images=x"], "--mode=evaluate on files needs --reference"),
        (["--mode=compare", "--out=x.html"], "--mode=compare on files needs --evaluations"),
        (["--mode=compare", "--evaluations=x", "--out=x.html"], "needs two files or more"),
        (["--mode=train", "--images=x"], "--images goes with"),
    ],
)
def test_flags_that_are_missing(capsys, arguments, message):
    flags.FLAGS.unparse_flags()
    for name in ("images", "reference", "inception", "evaluations", "out", "mode"):
        flags.FLAGS[name].unparse()
    assert main.main(["main", *arguments]) == 2
    assert message in capsys.readouterr().err
