"""Images as a condition through the jobs: joined to the noise along channels, dropped, asked for by file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.conditions.batches import batch_of
from tests.jobs.tiny import text_config, tiny_config
from trm_diffusion.analysis.grids import save_png
from trm_diffusion.conditions import make_condition
from trm_diffusion.conditions.context import Context
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.analyze import analyze
from trm_diffusion.jobs.evaluate import evaluate
from trm_diffusion.jobs.export_images import export
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime.signals import StopRequest

MAZES = dict(
    data__source="mazes", data__image_size=5, data__context_channels=3, data__num_classes=1, model__patch=1,
    evaluate__kind="mazes", evaluate__num_samples=20, data__flip=True,
)  # fmt: skip
PAIRS = dict(data__source="image_pairs", data__context_channels=3, data__num_classes=1, sample__per_class=2)
# The same with an MMDiT, whose text is the null in data without captions.
OF_WORDS = MAZES | dict(
    data__channels=1, model__mmdit__position_max_size=5, model__mmdit__position_base_size=5, sample__per_class=1
)
OF_ENCODED_TEXT = OF_WORDS | dict(model__text__encoder="encoded", model__text__pooled_features=3)
MMDITS = {"words": text_config(**OF_WORDS), "encoded text": text_config(**OF_ENCODED_TEXT)}


def test_the_network_is_given_noise_and_context_along_channels():
    config = tiny_config(**MAZES)
    experiment, batch = build(config), batch_of(config)
    assert experiment.model.shapes["patch_embed/kernel"].shape[0] == 1 + 3
    given = experiment.condition.from_batch(batch)
    joined, label = experiment.condition.apply(
        lambda images, times, label: (images, label), batch["image"], jnp.zeros(8), given
    )
    np.testing.assert_array_equal(joined, np.concatenate([batch["image"], batch["context"]], axis=-1))
    np.testing.assert_array_equal(label, np.zeros(8))
    null = experiment.condition.null
    assert not null.context.any() and null.beside == 1


def test_mazes_train_and_are_drawn_judged_and_analysed(tmp_path, capsys):
    """An untrained model solves none, and the report says so."""
    config, workdir, stop = tiny_config(**MAZES, log__samples_every=8), epath.Path(tmp_path), StopRequest()
    train(config, workdir, stop)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    grid = Image.open(workdir / "samples" / "update_0000008.png")
    assert grid.height > 10 * 2 * 5 * (64 // 5)  # a maze and what was drawn for it, in each of ten rows
    sample(config, workdir, stop)
    drawn = np.load(workdir / "samples" / "grid_0000008.npz")
    assert drawn["images"].shape == (10, 5, 5, 1) and drawn["context"].shape == (10, 5, 5, 3)
    evaluate(config, workdir, stop)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["rooms"] == 3 and report["split"] == "test" and report["num_images"] == 20
    assert report["solved"] == 0.0 and report["pass"] is False
    assert (workdir / "samples" / "evaluation.png").exists()
    analyze(config, workdir, stop)
    assert json.loads((workdir / "analysis.json").read_text())["protocol"]["samples"] == 8
    with pytest.raises(UserError, match="--num draws labels; this model draws .*--context=FILE_OR_FOLDER"):
        export(config, workdir, stop, 4)
    with pytest.raises(UserError, match=r"run with config.data.context_channels = 3, not 0"):
        train(
            tiny_config(data__source="synthetic", data__image_size=5, data__num_classes=1, model__patch=1),
            workdir,
            stop,
        )


@pytest.mark.parametrize("config", MMDITS.values(), ids=MMDITS)
def test_an_mmdit_is_given_the_context_along_channels_and_the_null_text(config):
    experiment, batch = build(config), batch_of(config)
    kernels = [shape for name, shape in experiment.model.shapes.items() if name.endswith("patch_embed/kernel")]
    assert [kernel.shape[0] for kernel in kernels] == [1 + 3]
    abstract = experiment.abstract_batch(8)
    assert {name: leaf.shape for name, leaf in batch.items()} == {name: leaf.shape for name, leaf in abstract.items()}
    condition = experiment.condition
    given = condition.from_batch(batch)
    joined, text = condition.apply(lambda images, times, text: (images, text), batch["image"], jnp.zeros(8), given)
    np.testing.assert_array_equal(joined, np.concatenate([batch["image"], batch["context"]], axis=-1))
    source = make_source(config.data)
    encoded = condition.encode([source[index] for index in range(8)])
    for found in (text, encoded.beside):
        jax.tree.map(np.testing.assert_array_equal, found, condition.null_like(given).beside)
    np.testing.assert_array_equal(encoded.context, batch["context"])
    dropped = condition.drop(given, jnp.arange(8) < 4)
    assert not dropped.context[:4].any() and dropped.context[4:].all()


def test_mazes_train_an_mmdit_and_are_drawn_judged_and_analysed(tmp_path, capsys):
    config, workdir, stop = text_config(**OF_WORDS, train__updates=4), epath.Path(tmp_path / "run"), StopRequest()
    train(config, workdir, stop)
    np.save(tmp_path / "mine.npy", np.stack([make_source(config.data)[index]["context"] for index in (3, 4)]))
    sample(config, workdir, stop, context=str(tmp_path / "mine.npy"))
    drawn = np.load(workdir / "samples" / "context_0000004.npz")
    assert drawn["images"].shape == (2, 5, 5, 1) and set(drawn.files) == {"images", "context"}
    evaluate(config, workdir, stop)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_images"] == 20
    analyze(config, workdir, stop)
    assert json.loads((workdir / "analysis.json").read_text())["protocol"]["samples"] == 8
    with pytest.raises(UserError, match="--prompt draws texts; this model draws .*--context=FILE_OR_FOLDER"):
        sample(config, workdir, stop, prompts=["a maze"])


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    """A folder of pairs: the target is grey, and as dark as the context is light, flat over 8x8."""
    root = tmp_path_factory.mktemp("pairs")
    for number, level in enumerate((0, 64, 128, 192, 255)):
        save_png(root / "context" / f"{number}.png", np.full((8, 8, 3), level, np.uint8))
        save_png(root / "target" / f"{number}.png", np.full((8, 8), 255 - level, np.uint8))
    return root


def test_a_folder_of_pairs_is_learnt_and_drawn_from_a_users_own_images(inverted, tmp_path, capsys):
    config = tiny_config(
        **PAIRS, data__path=str(inverted), train__updates=300, train__batch_size=16, optim__lr=3e-3,
        log__every=100, checkpoint__every=300, sample__diffusion_steps=10, sample__guidance=1.0, model__width=32,
        model__patch=2,
    )  # fmt: skip
    workdir, stop = epath.Path(tmp_path / "run"), StopRequest()
    train(config, workdir, stop)
    for name, level in (("dark", 20), ("light", 235)):
        save_png(tmp_path / "mine" / f"{name}.png", np.full((20, 20, 3), level, np.uint8))
    sample(config, workdir, stop, context=str(tmp_path / "mine"))
    folder = workdir / "samples" / "context_0000300"
    assert str(folder) in capsys.readouterr().err
    names = ["0000_dark.png", "0001_dark.png", "0002_light.png", "0003_light.png"]
    assert sorted(file.name for file in folder.iterdir()) == names
    arrays = np.load(workdir / "samples" / "context_0000300.npz")
    assert arrays["images"].shape == (4, 8, 8, 1) and arrays["context"].shape == (4, 8, 8, 3)
    means = arrays["images"].mean((1, 2, 3))
    assert means[:2].min() > 0.5 and means[2:].max() < -0.5


def test_with_everything_dropped_contexts_and_labels_do_not_matter():
    condition = make_condition(tiny_config(**MAZES))
    given = condition.from_batch(batch_of(condition.config))
    dropped = condition.drop(given, jnp.ones(8, bool))
    assert not dropped.context.any() and (dropped.beside == 1).all()
    kept = condition.drop(given, jnp.zeros(8, bool))
    np.testing.assert_array_equal(kept.context, given.context)


def test_records_become_their_condition():
    condition = make_condition(tiny_config(**MAZES))
    source = condition.source()
    encoded = condition.encode([source[4], source[2]])
    assert isinstance(encoded, Context) and encoded.beside.dtype == np.int32
    np.testing.assert_array_equal(encoded.context[1], source[2]["context"])


def test_requests_that_do_not_fit_are_refused_in_one_line(inverted):
    of_labels = make_condition(tiny_config())
    with pytest.raises(UserError, match="--context draws images from context images; this model draws labels"):
        of_labels.request_context(str(inverted))
    condition = make_condition(tiny_config(**PAIRS, data__path=str(inverted)))
    with pytest.raises(UserError, match="--prompt draws texts; this model draws .*--context=FILE_OR_FOLDER"):
        condition.request(["a red square"])
    with pytest.raises(UserError, match="no such file"):
        condition.request_context(str(inverted / "nowhere"))
    with_labels = make_condition(tiny_config(**PAIRS | dict(data__num_classes=4), data__path=str(inverted)))
    with pytest.raises(UserError, match="has 0 labels for the 5 images"):
        with_labels.request_context(str(inverted / "context"))
    labelled = dict(data__num_classes=4, sample__classes=(3,), sample__per_class=1)
    request = make_condition(tiny_config(**PAIRS | labelled, data__path=str(inverted))).request_context(
        str(inverted / "context")
    )
    assert request.condition.beside.tolist() == [3] * 5 and request.captions == ["0", "1", "2", "3", "4"]
