"""A run saves the latent spec of its data, decodes samples with it, and refuses any other spec."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.data import written
from tests.jobs.tiny import tiny_config, write_tiny_vae
from trm_diffusion.errors import UserError
from trm_diffusion.jobs.convert_weights import convert
from trm_diffusion.jobs.evaluate_images import sampling_record
from trm_diffusion.jobs.export_images import export
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.metrics.image_sets import open_images
from trm_diffusion.run import decoder
from trm_diffusion.runtime.sharding import MeshConfig, make_mesh
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.weights.store import load_vae

SIZE = 8  # latent cells a side


def write_latents(directory, spec):
    rng = np.random.default_rng(0)
    shape = (spec.size, spec.size, spec.channels)
    records = ((rng.standard_normal(shape), np.full(shape, 0.1), label) for label in range(10))
    written.write_latents(directory, spec, 10, records)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny autoencoder, its latents, and a run trained on them."""
    place = tmp_path_factory.mktemp("autoencoder")
    vae, spec = load_vae(write_tiny_vae(place / "vae"), SIZE)
    write_latents(place / "latents", spec)
    for name, changes in (("scale", dict(scale=0.7)), ("weights", dict(seed=1))):
        write_tiny_vae(place / name, **changes)
        write_latents(place / f"{name}_latents", load_vae(place / name, SIZE)[1])
    train(config_of(place, spec), epath.Path(place / "run"), StopRequest())
    return place, vae, spec


def config_of(place, spec, **overrides):
    fields = dict(data__source="latents", data__path=str(place / "latents"), data__channels=spec.channels)
    fields |= dict(model__depth=1, model__recursion__blocks="none", sample__batch_size=2, sample__guidance=1.0)
    return tiny_config(**fields | dict(train__updates=2, sample__classes=(1, 2)) | overrides)


def test_a_run_keeps_what_its_latents_are(place):
    place, _, spec = place
    assert json.loads((place / "run/latent.json").read_text()) == dataclasses.asdict(spec)
    convert(str(place / "run"), str(place / "converted"))
    assert decoder.kept_spec(place / "converted") == spec


def test_other_latents_are_refused_and_change_nothing(place, tmp_path):
    place, _, spec = place
    before = {file.name: file.read_bytes() for file in (place / "run").iterdir() if file.is_file()}
    run = epath.Path(place / "run")
    for changes, says in (
        (dict(data__path=str(place / "scale_latents")), "scale 0.7, not the 0.5 of the run in .*run; use the same"),
        (dict(data__path=str(place / "weights_latents")), "vae_id sha256:.*, not the sha256:.* of the run in"),
        (dict(data__vae=str(place / "weights")), "not the sha256:.* of config.data.vae"),
        (dict(data__source="synthetic"), "was trained on latents, which config.data.source synthetic does not hold"),
    ):
        with pytest.raises(UserError, match=says):
            train(config_of(place, spec, train__updates=3, **changes), run, StopRequest())
    fresh = dict(data__path=str(place / "scale_latents"), init__workdir=str(run))
    with pytest.raises(UserError, match="not the 0.5 of the run in .*run"):
        train(config_of(place, spec, **fresh), epath.Path(tmp_path / "fresh"), StopRequest())
    assert before == {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=r"config.data.vae .* has latents of scale 0.7, not the 0.5 of the run in"):
        sample(config_of(place, spec, data__vae=str(place / "scale")), run, StopRequest())


def test_samples_are_decoded_as_the_spec_says(place):
    place, vae, spec = place
    run = epath.Path(place / "run")
    sample(config_of(place, spec), run, StopRequest())
    latents = np.load(run / "samples/grid_0000002.npz")["images"]
    assert latents.shape == (2, SIZE, SIZE, spec.channels)
    sample(config_of(place, spec, data__vae=str(place / "vae")), run, StopRequest())
    images = np.load(run / "samples/grid_0000002.npz")["images"]
    expected = jax.jit(vae.decode)(latents / spec.scale + spec.shift)
    assert images.shape == (2, 2 * SIZE, 2 * SIZE, 3) and images.std() > 0.1
    np.testing.assert_allclose(images, expected, atol=1e-3)


def test_an_export_holds_images_and_says_which_autoencoder_made_them(place, tmp_path):
    place, _, spec = place
    run, count = epath.Path(place / "run"), 5
    config = config_of(place, spec, data__vae=str(place / "vae"))
    export(config, run, StopRequest(), count, str(tmp_path / "images"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / "images").glob("*.png"))])
    assert pixels.shape == (count, 2 * SIZE, 2 * SIZE, 3) and len(np.unique(pixels, axis=0)) == count
    record = sampling_record(open_images(str(tmp_path / "images")))
    assert record["vae"] == {"id": spec.vae_id, "scale": spec.scale, "shift": spec.shift}
    with pytest.raises(UserError, match="latents are exported .* autoencoder in config.data.vae"):
        export(config_of(place, spec), run, StopRequest(), count, str(tmp_path / "other"))
    labels = np.load(tmp_path / "images/labels.npy")
    chosen = dataclasses.replace(config.sample, classes=tuple(map(int, labels[:2])))
    sample(dataclasses.replace(config, sample=chosen), run, StopRequest())
    drawn = np.load(run / "samples/grid_0000002.npz")["images"]
    assert np.abs(np.clip(127.5 * drawn + 128, 0, 255).astype(np.uint8).astype(int) - pixels[:2]).max() <= 1


@pytest.mark.parametrize("kind", [{}, dict(latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609)])
def test_the_decoder_divides_batches_and_cuts_large_latents_into_tiles(kind, tmp_path, monkeypatch):
    """Both kinds of published autoencoder, on one device."""
    vae, spec = load_vae(write_tiny_vae(tmp_path / "vae", **kind), SIZE)
    mesh = make_mesh(MeshConfig())
    z = np.random.default_rng(0).standard_normal((5, SIZE, SIZE, spec.channels)).astype(np.float32)
    expected = jax.jit(vae.decode)(z / spec.scale + spec.shift)
    np.testing.assert_allclose(decoder.LatentDecoder(vae, spec, mesh)(z), expected, atol=1e-3)
    monkeypatch.setattr(decoder, "images_at_once", lambda size: 2)
    np.testing.assert_allclose(decoder.LatentDecoder(vae, spec, mesh)(z), expected, atol=1e-3)
    monkeypatch.setattr(decoder, "WHOLE_CELLS", 6)
    tiled = decoder.LatentDecoder(vae, spec, mesh)(z)
    assert tiled.shape == expected.shape and np.abs(tiled - expected).max() > 1e-3  # tiles were cut
