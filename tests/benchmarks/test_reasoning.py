"""The benchmark of reasoning on tiny runs: every T, other sizes, halting by path length, and the figure."""

import json

import pytest
from etils import epath
from PIL import Image

from benchmarks import reasoning
from tests.jobs.tiny import tiny_config
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime.signals import StopRequest

MAZES = dict(
    data__source="mazes", data__image_size=5, data__context_channels=3, data__num_classes=1, model__patch=1,
    evaluate__kind="mazes", sample__guidance=1.0, train__updates=1, checkpoint__every=1,
)  # fmt: skip


def measured(tmp_path, name, **overrides) -> dict:
    workdir = tmp_path / name
    train(tiny_config(**MAZES, **overrides), epath.Path(workdir), StopRequest())
    save = tmp_path / "reasoning.json"
    run = [f"{name}={workdir}", "--latent_steps=1", "--mazes=10", f"--save={save}"]
    assert reasoning.main([*run, "--sides=4"]) == 0
    return json.loads(save.read_text())["rows"]


def test_rows_are_added_by_name_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reasoning, "EPSILONS", (0.2,))
    measured(tmp_path, "base", model__recursion__blocks="none")
    rows = measured(tmp_path, "thinks", model__recursion__latent_steps=2)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pass"] is True
    base, thinks = rows["base"], rows["thinks"]
    assert list(base["by_latent_steps"]) == ["none"] and base["recursion"] is None and "halting" not in base
    assert list(thinks["by_latent_steps"]) == ["1", "2"] and thinks["trained_latent_steps"] == [2]
    assert thinks["forward_flops"] > base["forward_flops"] > 0 and list(base["by_side"]) == ["4"]
    mazes = [share["mazes"] for share in thinks["by_latent_steps"]["2"]["by_length"].values()]
    assert sum(mazes) == 10
    assert [point["epsilon"] for point in thinks["halting"]] == [0.2]
    ((length, latent_steps),) = thinks["halting"][0]["length_and_mean_latent_steps"]
    assert 1 <= length <= 8 and 1 <= latent_steps <= 2

    pytest.importorskip("matplotlib")
    save, figure = tmp_path / "reasoning.json", tmp_path / "figure.png"
    assert reasoning.main([f"--save={save}", f"--figure={figure}"]) == 0
    assert Image.open(figure).width > 300
    assert json.loads(save.read_text())["rows"].keys() == {"base", "thinks"}


def test_no_rows_is_a_failure(tmp_path):
    assert reasoning.main([f"--save={tmp_path / 'none.json'}"]) == 1
