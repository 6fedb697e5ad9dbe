"""A run's directory saves its config, refuses a config that does not fit it, and lists changed fields."""

import json

import pytest
from etils import epath

import trm_diffusion
from tests.jobs.tiny import tiny_config
from trm_diffusion.errors import UserError
from trm_diffusion.run.workdir import FORMAT, changed_fields, load_config, save_config


@pytest.fixture
def workdir(tmp_path):
    workdir = epath.Path(tmp_path / "deep" / "run")
    save_config(workdir, tiny_config())
    return workdir


def test_a_saved_config_comes_back_whole(workdir):
    assert load_config(workdir) == tiny_config()
    record = json.loads((workdir / "config.json").read_text())
    assert record["format"] == FORMAT and record["version"] == trm_diffusion.__version__
    assert [path.name for path in workdir.iterdir()] == ["config.json"]  # no temporary file is left


def test_a_newer_format_is_refused(workdir):
    path = workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}; this version reads up to {FORMAT}"):
        load_config(workdir)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run .*train first"):
        load_config(epath.Path(tmp_path))


def test_changed_fields_are_listed_with_both_values(workdir):
    assert changed_fields(workdir, tiny_config()) == []
    changed = changed_fields(workdir, tiny_config(optim__lr=0.5, train__latent_steps=(1, 2), sample__classes=(3,)))
    assert sorted(changed) == [
        "optim.lr: 0.01 -> 0.5",
        "sample.classes: [] -> [3]",
        "train.latent_steps: [] -> [1, 2]",
    ]


@pytest.mark.parametrize("field, value", [
    ("model__qk_norm", True), ("model__recursion__rank", 8), ("diffusion__objective", "ddpm"),
    ("optim__ema_decays", (0.9, 0.99)), ("train__trainable", "recursion"),
])  # fmt: skip
def test_fields_that_a_checkpoint_is_built_on_may_not_change(workdir, field, value):
    with pytest.raises(UserError, match=f"config.{field.replace('__', '.')} = .* another --workdir"):
        changed_fields(workdir, tiny_config(**{field: value}, sample__sampler="ddim"))


def test_how_a_model_is_computed_and_when_its_tokens_stop_may_change(workdir):
    changes = dict(remat="full", recursion__dispatch="dense", recursion__halting="convergence")
    changed = changed_fields(workdir, tiny_config(**{f"model__{name}": value for name, value in changes.items()}))
    assert len(changed) == 3
    with pytest.raises(UserError, match="config.model.recursion.halting = 'none', not 'learned'"):  # it has parameters
        changed_fields(workdir, tiny_config(model__recursion__halting="learned"))
