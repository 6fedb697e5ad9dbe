"""Text to image through the jobs: trained on captions, sampled from prompts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.conditions.batches import batch_of
from tests.jobs.tiny import text_config
from trm_diffusion.conditions import PROMPTS, base, make_condition
from trm_diffusion.conditions.words import load_words
from trm_diffusion.data.base import Source, make_captioned_element
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.evaluate import evaluate
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.jobs.train_step import loss_and_metrics
from trm_diffusion.models.tokenizer import null_tokens
from trm_diffusion.runtime.signals import StopRequest

COLORS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}


class SquareSource(Source):
    """A square of one of three colours on black, and its caption."""

    sample_shape, captioned, in_memory = (8, 8, 3), True, True
    vocabulary = ("a", "blue", "green", "red", "square")

    def __len__(self):
        return 12

    def __getitem__(self, index):
        color = list(COLORS)[index % 3]
        image = np.full(self.sample_shape, -1, np.float32)
        image[2:6, 2:6] = COLORS[color]
        return make_captioned_element(image, f"a {color} square", index)


# A patch has 12 values, fewer than the width: noise must pass through a token to be predicted.
LEARNING = dict(
    model__width=32, model__patch=2, model__mmdit__position_max_size=4, model__mmdit__position_base_size=4,
    train__updates=300, train__batch_size=16, optim__lr=3e-3, log__every=100, checkpoint__every=300,
    log__samples_every=300, sample__diffusion_steps=10, sample__guidance=3.0, sample__batch_size=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def squares():
    """Replaces scenes of 8x8 by squares."""

    def make(config):
        return SquareSource() if (config.source, config.image_size) == ("scenes", 8) else make_source(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "make_source", make)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, squares):
    path = epath.Path(tmp_path_factory.mktemp("run") / "squares")
    train(text_config(**LEARNING), path, StopRequest())
    return path


def test_training_keeps_the_words_and_draws_the_runs_own_captions(workdir):
    words = load_words(workdir)
    assert words.vocabulary == SquareSource.vocabulary and len(words.captions) == 10
    assert words.captions[:2] == ("a red square", "a green square")
    grid = Image.open(workdir / "samples" / "update_0000300.png")
    assert grid.height > 10 * 160 and grid.width > 2 * 160


def test_prompts_become_pictures_of_their_own_and_a_captioned_grid(workdir, capsys):
    """The pictures show what the prompts ask for."""
    sample(text_config(**LEARNING), workdir, StopRequest(), ["a red square", "a purple square", "a blue square"])
    text = capsys.readouterr().err
    assert '"purple"' in text and str(workdir / "samples" / "prompts_0000300") in text
    names = sorted(path.name for path in (workdir / "samples" / "prompts_0000300").iterdir())
    assert names == [
        "0000_a-red-square.png",
        "0001_a-red-square.png",
        "0002_a-purple-square.png",
        "0003_a-purple-square.png",
        "0004_a-blue-square.png",
        "0005_a-blue-square.png",
    ]
    arrays = np.load(workdir / "samples" / "prompts_0000300.npz")
    assert arrays["images"].shape == (6, 8, 8, 3) and arrays["prompts"][3] == "a purple square"
    for color, images in (("red", arrays["images"][:2]), ("blue", arrays["images"][4:])):
        np.testing.assert_allclose(images[:, 3:5, 3:5].mean((1, 2)), [COLORS[color]] * 2, atol=0.5)
    assert Image.open(workdir / "samples" / "prompts_0000300" / names[0]).size == (8, 8)


def test_a_prompt_that_is_cut_is_said_to_be(workdir, capsys):
    request = make_condition(text_config(**LEARNING), workdir, PROMPTS).request(["a red square a blue square"])
    assert "only the first 4 words" in capsys.readouterr().err
    assert request.condition.shape == (2, 5)


def test_other_words_are_refused(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(SquareSource, "vocabulary", ("a", "circle"))
    for directory, start in ((workdir, ""), (epath.Path(tmp_path), str(workdir))):
        with pytest.raises(UserError, match="other words"):
            train(text_config(init__workdir=start), directory, StopRequest())


def test_more_words_than_the_table_has_rows_are_refused(squares):
    with pytest.raises(UserError, match="need 8 rows"):
        make_condition(text_config(model__text__vocabulary=7)).source()


def test_scenes_are_evaluated_on_seen_and_held_out_compositions(tmp_path, capsys):
    """An untrained model draws noise: no image is right, and the report covers both splits."""
    config = text_config(
        data__image_size=32, model__patch=16, model__text__vocabulary=80, train__updates=1, evaluate__kind="scenes",
        evaluate__num_samples=12,
    )  # fmt: skip
    train(config, epath.Path(tmp_path), StopRequest())
    evaluate(config, epath.Path(tmp_path), StopRequest())
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "evaluation.json").read_text())
    assert report["seen"]["split"] == "seen" and report["held_out"]["num_images"] == 12
    assert report["seen"]["strict"]["overall"] == 0.0 and report["pass"] is False
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "evaluation_seen.png",
        "evaluation_held_out.png",
    }


def test_dropped_texts_become_the_empty_text(squares):
    """With every text dropped, the loss is that of the empty text, whatever the words."""
    experiment = build(text_config())
    rng = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(0.3 * rng.standard_normal(shape.shape), jnp.float32)
        for name, shape in experiment.model.shapes.items()
    }
    batch = batch_of(experiment.config)
    config = dataclasses.replace(experiment.config.train, label_dropout=1 - 2**-24)
    dropping = dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, train=config))
    keeping = dataclasses.replace(config, label_dropout=0.0)
    keeping = dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, train=keeping))

    def loss(experiment, tokens):
        return float(
            jax.jit(
                lambda tokens: loss_and_metrics(experiment, parameters, batch["image"], tokens, jax.random.key(1))[0]
            )(tokens)
        )

    empty = jnp.tile(null_tokens(5), (8, 1))
    assert loss(dropping, batch["tokens"]) == pytest.approx(loss(keeping, empty), rel=1e-6)
    assert abs(loss(keeping, batch["tokens"]) - loss(keeping, empty)) > 1e-4
