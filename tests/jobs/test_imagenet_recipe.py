"""Runs every command of docs/imagenet.md in order, in miniature, up to the table.

PyTorch files are .safetensors here; tests/parity/test_imagenet_recipe.py runs those commands unchanged.
"""

import json
import re

import numpy as np
import pytest

from tests.commands import ROOT, ran
from tests.recipe import CELLS, IMAGES, PAGE, STEPS, UPDATES, miniature, without_torch, write_inputs
from trm_diffusion.metrics.image_sets import open_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("imagenet")
    write_inputs(place)
    return place


@pytest.fixture(scope="module")
def outputs(place):
    """The output of each command; afterwards, samples of the recursion before its first update."""
    commands = [without_torch(command) for command in miniature()]
    (recursive,) = [command for command in commands if "--out=samples/middle" in command]
    commands.append(recursive.replace("/middle", "/fresh"))
    found = ran(commands, place, mock_images=IMAGES)
    for command, (code, text) in zip(commands, found, strict=True):
        assert code == 0, f"{command}\n{text[-3000:]}"
    return [text for _, text in found]


def printed(outputs, name):
    """The JSON line printed by the page's only command of this job."""
    text = outputs[[job for job, _ in STEPS].index(name)]
    return json.loads(re.search(r"^\{.*\}$", text, re.MULTILINE)[0])


def pictures(place, name):
    return np.concatenate(list(open_images(str(place / "samples" / name)).batches(IMAGES)))


def test_everything_that_was_prepared_is_there(outputs):
    report = printed(outputs, "verify")
    assert report["pass"] is True and report["bad_images"] == 0
    assert report["records"] == 2 * IMAGES  # with mirror images
    assert report["latent"].startswith(f"{CELLS}x{CELLS}x4, scale 0.18215")


def test_a_recursion_that_nothing_trained_draws_the_images_of_its_base(place, outputs):
    base = pictures(place, "base")
    assert base.shape == (IMAGES, 2 * CELLS, 2 * CELLS, 3) and base.std() > 5
    np.testing.assert_array_equal(pictures(place, "fresh"), base)
    assert (pictures(place, "middle") != base).any()


def test_the_table_compares_the_base_with_what_was_trained(place, outputs):
    lines = [json.loads(line) for line in (place / "runs/middle/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, UPDATES] and np.isfinite([line["loss"] for line in lines]).all()
    page, reports = (place / "imagenet.html").read_text(), {}
    for name in ("base", "middle"):
        report = reports[name] = json.loads((place / f"samples/{name}/evaluation.json").read_text())
        figures = [report[metric] for metric in ("fid", "sfid", "inception_score", "precision", "recall")]
        assert np.isfinite(figures).all() and f"samples/{name}/" in page and f"<td>{report['fid']:.4g} " in page
    sampling = {name: report["sampling"] for name, report in reports.items()}
    assert {name: record["update"] for name, record in sampling.items()} == {"base": 0, "middle": UPDATES}
    assert reports["base"]["fid"] != reports["middle"]["fid"]


def test_the_arithmetic_of_the_page_is_that_of_the_programs(outputs):
    kept, page = json.loads((ROOT / "docs/results/benchmark_imagenet.json").read_text()), PAGE.read_text()
    found = printed(outputs, "imagenet")
    assert found["pass"] is True and found == kept | {name: found[name] for name in ("machine", "compiler")}
    assert all(f"{count:,}" in page for count in found["parameters"].values())
    assert all(f" {flops:.0f} GFLOP" in page for flops in found["gigaflops_an_image"].values())
