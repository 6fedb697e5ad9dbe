"""The trace job: estimates after each latent step, and their pictures."""

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.jobs.tiny import text_config, tiny_config, write_tiny_vae
from trm_diffusion.data.mazes import CONTEXT, MazeSource
from trm_diffusion.errors import UserError
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.trace import trace
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime.signals import StopRequest

MAZES = dict(
    data__source="mazes", data__image_size=5, data__context_channels=3, data__num_classes=1, model__patch=1,
    model__recursion__latent_steps=3, sample__sampler="euler", evaluate__kind="none", sample__per_class=2,
)  # fmt: skip


def traced(config, workdir) -> dict:
    trace(config, workdir, StopRequest())
    (path,) = (workdir / "samples").glob("trace_*.npz")
    with np.load(path) as file:
        return dict(file)


def test_the_whole_network_draws_what_sampling_draws(tmp_path):
    """From pure noise to clean in one Euler step, the image is the estimate at the config's own T."""
    config = tiny_config(**MAZES, sample__guidance=2.0, sample__diffusion_steps=1)
    workdir = epath.Path(tmp_path)
    train(config, workdir, StopRequest())
    found = traced(config, workdir)
    assert found["estimates"].shape == (1, 3, 8, 5, 5, 1) and found["states"].shape == (1, 2, 8, 5, 5, 1)
    assert found["attention"].shape == (1, 3, 8, 25, 25) and found["context"].shape == (8, 5, 5, 3)
    np.testing.assert_allclose(found["estimates"][0, -1], found["images"], rtol=1e-4, atol=1e-4)
    assert np.abs(found["estimates"][0, 0] - found["images"]).max() > 1e-5  # fewer latent steps draw otherwise
    sample(config, workdir, StopRequest())
    drawn = np.load(workdir / "samples" / "grid_0000008.npz")["images"]
    np.testing.assert_allclose(found["images"], drawn[0:16:2], rtol=1e-5, atol=1e-5)  # one of each context
    pictures = sorted((workdir / "samples" / "trace_0000008").iterdir())
    assert [file.name for file in pictures] == [f"{number:04d}.png" for number in range(8)]
    rows, columns = 1 + 3, 1 + 3  # given and drawn; T = k, states, attention
    assert Image.open(pictures[0]).size[0] > columns * 90 and Image.open(pictures[0]).size[1] > rows * 90


def test_the_keys_of_a_text_come_after_those_of_the_image(tmp_path):
    scenes = dict(data__image_size=32, model__patch=16, model__text__vocabulary=80)
    config = text_config(model__recursion__latent_steps=2, **scenes)
    workdir = epath.Path(tmp_path)
    train(config, workdir, StopRequest())
    weights, tokens = traced(config, workdir)["attention"], (config.data.image_size // config.model.patch) ** 2
    assert weights.shape[-2:] == (tokens, tokens + config.model.text.length)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert weights[..., tokens:].any()


def test_latents_are_decoded_for_the_pictures(tmp_path):
    latents = dict(data__source="synthetic", data__channels=4, data__vae=write_tiny_vae(tmp_path / "vae"))
    config = tiny_config(model__recursion__latent_steps=2, evaluate__kind="none", **latents)
    workdir = epath.Path(tmp_path / "run")
    train(config, workdir, StopRequest())
    assert traced(config, workdir)["images"].shape[1:] == (8, 8, 4)
    picture = Image.open(workdir / "samples" / "trace_0000008" / "0000.png")
    assert picture.width > 3 * (96 // 16) * 16  # images of 16 pixels a side
    red, green, _ = np.moveaxis(np.asarray(picture, int)[:90], -1, 0)
    assert np.abs(red - green).max() > 0  # in colour, as the autoencoder draws


def test_a_run_without_recursion_has_nothing_to_trace(tmp_path):
    with pytest.raises(UserError, match="no latent step can be traced"):
        trace(tiny_config(model__recursion__blocks="none"), epath.Path(tmp_path), StopRequest())


def test_the_focus_of_a_maze_is_its_goal():
    source = MazeSource(3, "test")
    row, column = MazeSource.focus(source[4]["context"])
    assert (row, column) == source.maze(4).goal and source[4]["context"][row, column, CONTEXT.index("goal")] == 1
