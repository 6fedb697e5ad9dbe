"""Benchmark exports: official layout, images depend only on prompt and index, interruptions change no byte."""

import io
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.jobs.tiny import command, text_config, tiny_config
from trm_diffusion.conditions import make_condition
from trm_diffusion.config import to_dict
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.export_prompts import export_prompts
from trm_diffusion.jobs.sample import sample
from trm_diffusion.machine import machine
from trm_diffusion.metrics import dpg, geneval
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.workdir import save_config
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.signals import StopRequest

DEAD = 2**30  # no process has this number
TEXTS = ["a red circle", "two blue squares", "a zebra left of a photo", "a green cross", "three red circles"]


def config_of(**overrides):
    fields = dict(data__image_size=32, model__patch=16, model__text__vocabulary=80)
    return text_config(**fields | dict(sample__batch_size=8) | overrides)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of scenes with random weights, so that every word has an effect, and prompts for it."""
    place = tmp_path_factory.mktemp("export")
    config, workdir, rng = config_of(), epath.Path(place) / "run", np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), build(config).abstract_state
    )
    condition = make_condition(config, workdir)
    source = condition.source()
    iterator = make_iterator(source, config.data, seed=0, batch_size=8)
    save_config(workdir, config)
    condition.keep(source)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(0, state, iterator, {"updates": 0})
    write_prompts(place, TEXTS)
    return place


def write_prompts(place, texts):
    include = [{"class": "circle", "count": 1}]
    lines = [json.dumps({"tag": "counting", "include": include, "prompt": text}) for text in texts]
    (place / "geneval.jsonl").write_text("\n".join(lines))
    (place / "dpg").mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (place / "dpg" / f"item{number}.txt").write_text(text)


def exported(place, out, benchmark="geneval", stop=None, prompts=None, **overrides):
    """The paths and bytes of all files that an export writes."""
    prompts = str(prompts or place / {"geneval": "geneval.jsonl", "dpg": "dpg"}[benchmark])
    run, config = epath.Path(place) / "run", config_of(**overrides)
    export_prompts(config, run, stop or StopRequest(), benchmark=benchmark, prompts=prompts, out=str(out))
    return contents(out)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(place):
    return exported(place, place / "whole")


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)), np.int32)


def test_geneval_has_the_official_layout(place, whole):
    assert len(whole) == 5 * 5 and json.loads(whole["00002/metadata.jsonl"])["prompt"] == TEXTS[2]
    prompts = geneval.read_prompts(place / "geneval.jsonl")
    assert geneval.check_export(place / "whole", prompts)["num_images"] == 20
    images = np.stack([pixels(data) for path, data in whole.items() if path.endswith(".png")])
    assert images.shape == (20, 32, 32, 3) and len(np.unique(images, axis=0)) == 20
    record = json.loads((place / "whole.sampling.json").read_text())
    assert record["samples"] == 20 and record["sample_seed"] == 0 and len(record["geneval"]) == 64


def test_an_image_depends_on_its_prompt_and_index_alone(place, whole, tmp_path):
    """It equals the --prompts image of that index, in batches of any size; DPG-Bench's grids show the same four."""
    one = exported(place, tmp_path / "one", sample__batch_size=3)
    assert (
        one.keys() == whole.keys()
        and max(np.abs(pixels(whole[p]) - pixels(one[p])).max() for p in one if "png" in p) <= 1
    )
    sample(config_of(sample__per_class=4, sample__batch_size=20), epath.Path(place) / "run", StopRequest(), TEXTS)
    drawn = sorted((place / "run" / "samples" / "prompts_0000000").iterdir())
    grids = exported(place, tmp_path / "dpg", "dpg")
    assert grids.keys() == {f"item{number}.png" for number in range(5)}
    for prompt in range(5):
        four = dpg.split_grid(pixels(grids[f"item{prompt}.png"]))
        for image in range(4):
            wanted = pixels(whole[f"{prompt:05d}/samples/{image:04d}.png"])
            assert np.abs(four[image] - wanted).max() <= 1
            assert np.abs(pixels(drawn[4 * prompt + image].read_bytes()) - wanted).max() <= 1
    (tmp_path / "dpg" / "item3.png").unlink()
    assert exported(place, tmp_path / "dpg", "dpg") == grids
    write_prompts(tmp_path, [TEXTS[0], TEXTS[0], *TEXTS[2:]])
    other = exported(place, tmp_path / "other", prompts=tmp_path / "geneval.jsonl")
    images = [path for path in whole if path.endswith(".png")]
    changed = {path for path in images if (pixels(other[path]) != pixels(whole[path])).any()}
    assert changed == {f"00001/samples/{image:04d}.png" for image in range(4)}
    assert np.abs(pixels(other["00000/samples/0000.png"]) - pixels(other["00001/samples/0000.png"])).max() > 50


def test_interrupted_and_started_again_ends_with_the_same_bytes(place, whole, tmp_path, monkeypatch, capsys):
    stop, write = StopRequest(), geneval.write_image

    def stopping(*arguments):
        write(*arguments)
        stop.requested = True

    monkeypatch.setattr(geneval, "write_image", stopping)
    with pytest.raises(Interrupted):
        exported(place, tmp_path / "images", stop=stop)
    monkeypatch.undo()
    assert "1 of 5 prompts are not fully read; the first: this run knows no word" in capsys.readouterr().err
    folder = tmp_path / "images" / "00001"
    (folder / "samples" / "0003.png").unlink()
    (folder / "metadata.jsonl").unlink()
    first, other = (tmp_path / "images" / "00000" / "samples" / f"000{image}.png" for image in (0, 1))
    first.write_bytes(other.read_bytes())
    (tmp_path / "images" / "00000" / "metadata.jsonl").write_text('{"prompt": "another"}')
    (folder / "samples" / f".0003.png.partial-{machine()}-{DEAD}").write_bytes(b"torn")
    assert exported(place, tmp_path / "images") == whole
    monkeypatch.setattr(geneval, "write_image", None)  # would raise: nothing is drawn twice
    assert exported(place, tmp_path / "images") == whole


def test_killed_and_started_again_ends_with_the_same_bytes(place, tmp_path):
    """With SIGKILL, through the command line."""
    write_prompts(tmp_path, [f"{number} red circles" for number in range(60)])
    settings, source, killed = to_dict(config_of(sample__batch_size=4)), tmp_path / "geneval.jsonl", tmp_path / "killed"
    (tmp_path / "tiny.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({settings!r})\n"
    )
    flags = (f"--config={tmp_path / 'tiny.py'}", f"--workdir={place / 'run'}", "--mode=sample", "--export=geneval")
    process = command(*flags, f"--prompts={source}", f"--out={killed}")
    while process.poll() is None and len(list(killed.rglob("*.png"))) < 10:
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=300)
    before = {path: data for path, data in contents(killed).items() if Path(path).name[0] != "."}
    assert 10 <= len(before) < 5 * 60
    after, whole = (exported(place, out, prompts=source, sample__batch_size=4) for out in (killed, tmp_path / "whole"))
    assert after == whole and before.items() <= whole.items()


def test_a_folder_in_use_is_refused(place, tmp_path):
    with claimed(tmp_path, "--mode=sample", StopRequest()), pytest.raises(UserError, match="is in use: --mode=sample"):
        exported(place, tmp_path)


def test_what_is_wrong_is_one_line(place, whole, tmp_path):
    extra = place / "whole" / "00003" / "samples" / "0004.png"
    extra.write_bytes(b"")
    with pytest.raises(UserError, match=r"00003/samples/0004\.png not part of the export"):
        exported(place, place / "whole")
    extra.unlink()
    with pytest.raises(UserError, match="drawn with diffusion_steps = 2, not 3: remove it, or give another --out"):
        exported(place, place / "whole", sample__diffusion_steps=3)
    with pytest.raises(UserError, match=r"is not empty and has no run\.sampling\.json beside it"):
        exported(place, place / "run")
    record = place / "whole.sampling.json"
    words, text = place / "run" / "words.json", (place / "run" / "words.json").read_text()
    first, second, *_ = json.loads(text)["vocabulary"]
    words.write_text(
        text.replace(f'"{first}"', '"?"').replace(f'"{second}"', f'"{first}"').replace('"?"', f'"{second}"')
    )
    with pytest.raises(UserError, match="drawn with text.words_sha256 = "):
        exported(place, place / "whole")
    words.write_text(text)
    assert json.loads(record.read_text())["text"].keys() == {"words_sha256"}
    assert contents(place / "whole") == whole
    for benchmark, line, says in (
        ("geneval", '{"tag": "counting", "prompt": "a"}', "line 1: include is missing"),
        ("geneval", '{"tag": "colours", "include": [], "prompt": "a"}', "tag 'colours' is none of"),
        ("geneval", '{"tag": "counting", "include": [], "prompt": ["a"]}', "not text"),
        ("geneval", '{"tag": "counting", "include"', "line 1: not JSON"),
        ("dpg", '{"item_id": "../a", "prompt": "a"}', "cannot name a file"),
        ("dpg", '{"item_id": "a", "prompt": ""}', "of item a is empty"),
        ("dpg", '{"item_id": 1, "prompt": "a"}\n{"item_id": "1", "prompt": "b"}', "1 of its item ids appear twice"),
    ):
        (tmp_path / "prompts.jsonl").write_text(line)
        with pytest.raises(UserError, match=says):
            exported(place, tmp_path / "refused", benchmark, prompts=tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match="--export=dpg draws texts; this model draws labels"):
        export_prompts(tiny_config(), epath.Path(place), StopRequest(), benchmark="dpg", prompts=str(place / "dpg"))
    assert not (tmp_path / "refused").exists()
