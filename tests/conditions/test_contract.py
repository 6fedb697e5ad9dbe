"""Every kind implements `Condition`; a new kind is one class in one file and one line in the table."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conditions.batches import batch_of
from tests.jobs.tiny import ROOT, text_config, tiny_config
from trm_diffusion.conditions import LABELS, NOTHING, PROMPTS, TEXTS, kind_of, kinds, make_condition
from trm_diffusion.conditions.context import ContextImage
from trm_diffusion.conditions.encoded_text import EncodedText
from trm_diffusion.conditions.labels import Labels
from trm_diffusion.conditions.words import Words
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build

ENCODED = dict(data__source="synthetic", data__num_classes=1, model__text__encoder="encoded")
SCENES = dict(data__image_size=32, model__patch=16, model__text__vocabulary=80)
MAZES = dict(data__source="mazes", data__image_size=5, data__context_channels=3, data__num_classes=1)
CONFIGS = {
    ContextImage: tiny_config(**MAZES, model__patch=5),
    Labels: tiny_config(),
    Words: text_config(**SCENES),
    EncodedText: text_config(**ENCODED, model__text__pooled_features=3),
}


def test_each_kind_is_tested():
    assert set(CONFIGS) == set(kinds())


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_data_shapes_and_null_agree(kind):
    """Batches have the shapes that programs are compiled for; the null has those of one image."""
    config = CONFIGS[kind]
    special_case_of = {ContextImage: [Labels]}  # kinds that match as well, and come after it
    assert kind_of(config) is kind
    assert [other for other in kinds() if other.matches(config)] == [kind, *special_case_of.get(kind, [])]
    experiment, batch = build(config), batch_of(config)
    abstract = experiment.abstract_batch(8)
    assert batch.keys() == abstract.keys()
    for name, array in batch.items():
        assert (array.shape, array.dtype) == (abstract[name].shape, abstract[name].dtype), name
    condition = experiment.condition.from_batch(batch)
    for null, given in zip(jax.tree.leaves(experiment.condition.null), jax.tree.leaves(condition), strict=True):
        assert (null.shape, null.dtype) == (given.shape[1:], given.dtype)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_what_is_dropped_is_null_and_the_rest_stays(kind):
    condition = make_condition(CONFIGS[kind])
    given = condition.from_batch(batch_of(CONFIGS[kind]))
    dropped = jnp.arange(8) % 3 == 0
    nulls = jax.tree.leaves(condition.null_like(given))
    leaves = zip(jax.tree.leaves(condition.drop(given, dropped)), nulls, jax.tree.leaves(given), strict=True)
    for found, null, before in leaves:
        assert found.dtype == before.dtype
        np.testing.assert_array_equal(found[dropped], null[dropped])
        np.testing.assert_array_equal(found[~dropped], before[~dropped])


def test_another_request_than_the_kind_draws_is_refused():
    Labels.require(LABELS, "--num")
    EncodedText.require(TEXTS, "--export=dpg")
    with pytest.raises(UserError, match="--num draws labels; this model draws texts: .*--prompts=FILE"):
        Words.require(LABELS, "--num")
    with pytest.raises(UserError, match="--prompt draws texts; this model draws labels: .*config.sample.classes"):
        make_condition(tiny_config()).request(["a red square"])


def test_programs_are_compiled_without_the_files_that_a_config_names():
    config = text_config(**ENCODED | dict(data__source="latents"), data__text="/nowhere")
    null = make_condition(config, reads=NOTHING).null
    assert null.mask.all() and not null.states.any()
    experiment = build(config)  # reads no file until `null` is needed
    with pytest.raises(UserError, match="/nowhere"):
        _ = experiment.condition.null


def test_prompts_are_not_encoded_beside_the_null_of_synthetic_text():
    config = text_config(**ENCODED, model__text__pretrained="some/encoder")
    with pytest.raises(ValueError, match="reads PROMPTS"):
        make_condition(config).encode(["a cat"])
    with pytest.raises(UserError, match="this model reads encoded text: encode prompts"):
        make_condition(text_config(**ENCODED), reads=PROMPTS).request(["a cat"])


def test_a_new_kind_is_one_file_and_one_entry(tmp_path):
    """In a copy of the package, a model with an image as its condition is trained, guided, sampled and analysed."""
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("trm_diffusion", "tests/jobs", "tests/conditions"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    conditions = tmp_path / "trm_diffusion" / "conditions"
    shutil.copy(ROOT / "tests" / "conditions" / "low_resolution.py", conditions)
    table = (conditions / "__init__.py").read_text()
    before = "KINDS = (\n"
    assert before in table
    table = table.replace(before, before + '    "trm_diffusion.conditions.low_resolution:LowResolution",\n')
    (conditions / "__init__.py").write_text(table)
    child = subprocess.run(
        [sys.executable, "-m", "tests.conditions.enlarge"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-3000:]
