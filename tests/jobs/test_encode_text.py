"""Encoding captions: interruptions change no byte; the text is joined with latents, trained on and sampled from."""

import dataclasses
import json
import pickle
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.jobs.encoders import FakeEncoder
from tests.jobs.tiny import ROOT, text_config, write_tiny_vae
from trm_diffusion.conditions import PROMPTS, encoded_text, make_condition
from trm_diffusion.config import to_dict
from trm_diffusion.data.encodings import Encodings, open_encodings
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs import encode_text as module
from trm_diffusion.jobs import sample as sample_module
from trm_diffusion.jobs.encode_text import encode
from trm_diffusion.jobs.prepare_latents import prepare
from trm_diffusion.jobs.sample import make_sample_fn
from trm_diffusion.jobs.train import train
from trm_diffusion.jobs.train_step import loss_and_metrics
from trm_diffusion.jobs.verify_data import verify
from trm_diffusion.models.text import Text
from trm_diffusion.run.claim import CLAIM, claimed
from trm_diffusion.runtime.signals import StopRequest

CAPTIONS = [["a cat", "one cat", "a grey cat"], ["a dog"], ["no picture"], ["two birds", "birds"], ["a cat"]]
BAD, PER_SHARD = 2, 2


def config_of(place, **overrides):
    fields = dict(
        data__source="caption_folder", data__path=str(place / "images"), data__channels=4, data__num_classes=0,
        data__vae=str(place / "vae"), model__text__encoder="encoded", model__text__pretrained="some/encoder",
        model__text__pooled_features=6, sample__per_class=1, train__updates=2,
    )  # fmt: skip
    return text_config(**fields | overrides)


def latents_of(place, **overrides):
    return config_of(place, data__source="latents", data__path=str(place / "latents"), **overrides)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Five pictures with captions, one damaged; their latents with mirror images, and their encoded captions."""
    place = tmp_path_factory.mktemp("encode")
    write_tiny_vae(place / "vae")
    (place / "images").mkdir()
    lines = [json.dumps({"file": f"{i}.png", "captions": captions}) for i, captions in enumerate(CAPTIONS)]
    (place / "images" / "captions.jsonl").write_text("\n".join(lines))
    for i in range(len(CAPTIONS)):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{i}.png")
    (place / "images" / f"{BAD}.png").write_bytes(b"no picture")
    prepare(config_of(place, data__flip=True), str(place / "latents"), StopRequest(), images_per_shard=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PretrainedEncoder", FakeEncoder)
        patch.setattr(encoded_text, "PretrainedEncoder", FakeEncoder)
        encoded(place, place / "texts")
        yield place


def encoded(place, out, config=None, stop=None, **options):
    encode(config or config_of(place), str(out), stop or StopRequest(), items_per_shard=PER_SHARD, **options)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_every_caption_is_encoded_and_found(place):
    encodings = open_encodings(str(place / "texts"), config_of(place).model.text)
    fake = FakeEncoder(config_of(place).model.text)
    assert encodings.names == [f"{i}.png" for i in range(5)] and len(encodings) == 5
    encodings[0]  # opens the readers before the copy is made
    for reader in (encodings, pickle.loads(pickle.dumps(encodings))):
        for item, captions in enumerate(CAPTIONS):
            records = reader.records_of(item)
            assert [reader.caption(record) for record in records] == captions
            for record, caption in zip(records, captions, strict=True):
                for found, wanted in zip(reader[record], fake.one(caption), strict=True):
                    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
    assert encodings.find("birds") == 7 and encodings.caption(encodings.find("a cat")) == "a cat"
    np.testing.assert_allclose(encodings.null.pooled, fake.one("").pooled, rtol=1e-6)
    assert encodings.find("a horse") is None
    manifest = json.loads((place / "texts" / "manifest.json").read_text())
    assert manifest["records"] == 9 and [shard["records"] for shard in manifest["shards"]] == [4, 2, 3]
    assert manifest["preparation"]["pretrained"] == "some/encoder" and manifest["written_by"]["fake"] == "1"


def test_stopped_and_shared_by_two_it_ends_with_the_same_bytes(place, tmp_path, monkeypatch):
    stop, write_shard = StopRequest(), module.TextJob.write_shard

    def stopping(self, index, advance):
        stop.requested = index == 1
        return write_shard(self, index, advance)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="in shard 2 of 3, after 4 of 9 texts"):
        patch.setattr(module.TextJob, "write_shard", stopping)
        encoded(place, tmp_path, stop=stop)
    assert len(contents(tmp_path)) == 2  # one shard and the file about it
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Encodings(str(tmp_path))
    for index in (1, 0):
        encoded(place, tmp_path, process_index=index, process_count=2)
    assert contents(tmp_path) == contents(place / "texts")


def test_killed_and_started_again_it_is_the_same(place, tmp_path):
    """Through the command line, with SIGKILL in the middle of a shard."""
    settings, out = to_dict(config_of(place)), tmp_path / "texts"
    (tmp_path / "tiny.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({settings!r})\n"
    )
    flags = ["--mode=encode", f"--config={tmp_path / 'tiny.py'}", f"--images_per_shard={PER_SHARD}", f"--out={out}"]
    program = [sys.executable, "-m", "tests.jobs.killed_in_shard", *flags]
    killed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    claim, left, *whole = sorted(contents(out))
    assert claim == CLAIM
    assert whole == ["texts-00000.array_record", "texts-00000.json"]
    assert left.startswith(".texts-00001.array_record.partial-")
    encoded(place, out)
    assert contents(out) == contents(place / "texts")


def test_a_directory_in_use_is_refused(place, tmp_path):
    with claimed(tmp_path, "--mode=encode", StopRequest()), pytest.raises(UserError, match="is in use: --mode=encode"):
        encoded(place, tmp_path)


def test_what_was_encoded_otherwise_is_refused(place, tmp_path, monkeypatch):
    before = contents(place / "texts")
    text = config_of(place).model.text
    for changes, says in (
        (dict(features=12), "features 8, not config.model.text.features 12"),
        (dict(length=9), "length 5, not"),
        (dict(recipe="sd3"), "recipe 'single', not"),
        (dict(pretrained="other/encoder"), "pretrained 'some/encoder', not"),
        (dict(revision="v2"), "revision '', not"),
    ):
        with pytest.raises(UserError, match=says):
            open_encodings(str(place / "texts"), dataclasses.replace(text, **changes))
    with pytest.raises(UserError, match="made with length = 5, not 9: remove it, or give another --out"):
        encoded(place, place / "texts", config_of(place, model__text__length=9))
    monkeypatch.setattr(FakeEncoder, "weights", "second")
    with pytest.raises(UserError, match="made with encoders = .*first.*, not .*second"):
        encoded(place, place / "texts")
    with pytest.raises(UserError, match="set config.data.source to one of emoji, caption_folder, tfds_captions"):
        encoded(place, tmp_path / "refused", latents_of(place))
    assert contents(place / "texts") == before and not (tmp_path / "refused").exists()


def test_captions_that_were_edited_are_noticed(place, tmp_path):
    """When they are encoded again, and when a run reads the captions beside their encoding."""
    shutil.copytree(place / "images", tmp_path / "images")
    path = tmp_path / "images" / "captions.jsonl"
    path.write_text(path.read_text().replace("birds", "gulls"))
    edited = config_of(place, data__path=str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"holds texts made from other texts for 1 record \(3\.png\): remove it, or"):
        encoded(place, place / "texts", edited)
    fields = dict(data__text=str(place / "texts"), data__channels=3, data__vae="")
    assert len(make_condition(config_of(place, **fields)).source()) == len(CAPTIONS)
    with pytest.raises(UserError, match=r"other captions than config.data.path for 1 record \(3\.png\): run --mode"):
        make_condition(config_of(place, **fields | dict(data__path=str(tmp_path / "images")))).source()


def test_damage_is_named(place, tmp_path):
    for name, content in contents(place / "texts").items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "texts-00001.json").write_text("{")
    with pytest.raises(UserError, match="texts-00001.array_record or its JSON file is missing or damaged"):
        Encodings(str(tmp_path))


def test_verify_reads_encoded_text_again(place, tmp_path, capsys, monkeypatch):
    def copy(name):
        (tmp_path / name).mkdir()
        for file, content in contents(place / "texts").items():
            (tmp_path / name / file).write_bytes(content)
        return tmp_path / name

    def flip(directory):
        path = directory / "texts-00001.array_record"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def other_sizes(directory):
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["encoding"]["features"] += 1
        path.write_text(json.dumps(manifest))

    assert verify(str(place / "texts"), config_of(place))
    report = json.loads(capsys.readouterr().out)
    assert report["pass"] and report["items"] == 6 and report["text"] == "length 5, features 8, pooled_features 6"
    for name, damage, says in (
        ("byte", flip, "texts-00001.array_record is damaged: its checksum"),
        ("gone", lambda d: (d / "texts-00001.array_record").unlink(), "texts-00001.array_record is missing"),
        ("about", lambda d: (d / "texts-00001.json").write_text("{"), "texts-00001.json is damaged"),
        ("more", lambda d: (d / "texts-00009.array_record").write_bytes(b""), "texts-00009.array_record is not in"),
        ("sizes", other_sizes, "encoding is not what the records"),
    ):
        directory = copy(name)
        damage(directory)
        assert not verify(str(directory))
        assert says in capsys.readouterr().err.splitlines()[0]
    for number, content in enumerate(("3", '{"encoding": {}}', '{"format_version": 1, "encoding": 3}')):
        (directory := copy(f"manifest{number}")).joinpath("manifest.json").write_text(content)
        with pytest.raises(UserError, match="manifest.json: "):
            verify(str(directory))
    assert not verify(str(place / "texts"), config_of(place, model__text__features=12))
    assert "features 8, not config.model.text.features 12" in capsys.readouterr().err


def test_latents_are_joined_with_the_captions_of_their_images(place):
    """The damaged picture has none, mirror images share their picture's, and training draws every caption."""
    config = latents_of(place, data__text=str(place / "texts"))
    source = make_condition(config).source()
    images = [i for i in range(5) if i != BAD for _ in range(2)]
    fake = FakeEncoder(config.model.text)
    assert len(source) == len(images) == 8 and source.spec.channels == 4
    assert verify(str(place / "latents"), latents_of(place))
    for index, image in enumerate(images):
        np.testing.assert_allclose(source[index]["pooled"], fake.one(CAPTIONS[image][0]).pooled, rtol=1e-6)
    iterator = make_iterator(source, config.data, seed=0, batch_size=8 * 40)
    batch = next(iterator)
    iterator.close()
    for index, image in enumerate(images):
        drawn = {float(pooled[0]) for pooled in batch["pooled"][batch["index"] == index]}
        assert drawn == {float(fake.one(caption).pooled[0]) for caption in CAPTIONS[image]}


def test_encodings_of_other_images_are_refused(place, tmp_path):
    (tmp_path / "words.txt").write_text("a cat\na dog\n")
    encoded(place, tmp_path / "texts", prompts=str(tmp_path / "words.txt"))
    with pytest.raises(UserError, match="the texts of other images"):
        make_condition(latents_of(place, data__text=str(tmp_path / "texts"))).source()
    with pytest.raises(UserError, match="encode the captions of config.data.source latents with --mode=encode"):
        make_condition(latents_of(place)).source()


@pytest.fixture(scope="module")
def workdir(place):
    path = epath.Path(place) / "run"
    train(latents_of(place, data__text=str(place / "texts")), path, StopRequest())
    return path


def test_a_run_keeps_what_encodes_its_texts(place, workdir, monkeypatch):
    kept = json.loads((workdir / "text.json").read_text())
    assert kept["pretrained"] == "some/encoder" and kept["length"] == 5
    assert (workdir / "metrics.jsonl").exists()
    monkeypatch.setattr(FakeEncoder, "weights", "second")
    for start in (workdir, workdir / "new"):
        with pytest.raises(UserError, match="texts are encoded with other encoders than those of the run"):
            make_condition(latents_of(place, init__workdir=str(workdir)), start, PROMPTS).encode(["a dog"])


def test_the_empty_text_stands_for_none_in_training_and_in_guidance(place):
    config = latents_of(place, data__text=str(place / "texts"))
    null, fake = Encodings(str(place / "texts")).null, FakeEncoder(config.model.text)
    experiment, rng = build(config), np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(0.3 * rng.standard_normal(shape.shape), jnp.float32)
        for name, shape in experiment.model.shapes.items()
    }
    images = jnp.asarray(rng.standard_normal((8, 8, 8, 4)), jnp.float32)
    given, empty = (
        Text(*map(jnp.stack, zip(*texts, strict=True))) for texts in (map(fake.one, "abcdefgh"), [null] * 8)
    )

    def of(null=None, **changes):
        """The experiment with changes to its config; null: replaces that of the condition."""
        settings = {group: dataclasses.replace(getattr(config, group), **fields) for group, fields in changes.items()}
        condition = make_condition(config)
        if null is not None:
            condition.null = null
        return dataclasses.replace(experiment, config=dataclasses.replace(config, **settings), condition=condition)

    def loss(experiment):
        return jax.jit(lambda text: loss_and_metrics(experiment, parameters, images, text, jax.random.key(1))[0])

    keep = loss(of(train=dict(label_dropout=0.0)))
    np.testing.assert_allclose(loss(of(train=dict(label_dropout=0.999999)))(given), keep(empty), rtol=1e-6)
    assert abs(keep(given) - keep(empty)) > 1e-4

    def drawn(experiment):
        return np.asarray(make_sample_fn(experiment)(parameters, empty, jnp.arange(8)))

    plain = drawn(of(sample=dict(guidance=1.0)))
    # The condition is the null, so guidance changes nothing.
    np.testing.assert_allclose(drawn(of(sample=dict(guidance=3.0))), plain, atol=1e-4)
    assert np.abs(drawn(of(fake.one("a"), sample=dict(guidance=3.0))) - plain).max() > 1e-2


def test_prompts_are_read_from_a_cache_or_encoded(place, workdir):
    texts, asked = str(place / "texts"), ["a dog", "a horse", "birds"]

    def request(prompts_, **overrides):
        condition = make_condition(latents_of(place, **overrides), workdir, PROMPTS)
        return condition.request(prompts_), condition

    fresh = request(asked)
    for request_, condition in (fresh, request(asked, data__text=texts)):
        assert request_.captions == asked
        fake = FakeEncoder(latents_of(place).model.text)
        for found, wanted in zip((*request_.condition, *condition.null), (*fake(asked), *fake.one("")), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
    cached, _ = request(["birds"], data__text=texts, model__text__pretrained="")
    np.testing.assert_array_equal(cached.condition.pooled[0], fresh[0].condition.pooled[2])
    own, _ = request((), data__text=texts)
    assert own.captions == ["a cat", "a dog", "no picture", "two birds", "a cat"]
    for overrides, says in (
        (dict(data__text=texts), 'has no "a dog!": encode prompts with --mode=encode --prompts=FILE'),
        ({}, "this model reads encoded text: encode prompts"),
    ):
        with pytest.raises(UserError, match=says):
            request(["a dog!"], model__text__pretrained="", **overrides)


def test_samples_are_guided_away_from_the_empty_text(place, workdir, monkeypatch):
    seen, make = [], sample_module.make_sample_fn
    monkeypatch.setattr(
        sample_module, "make_sample_fn", lambda experiment, *rest: seen.append(experiment) or make(experiment, *rest)
    )
    sample_module.sample(latents_of(place), workdir, StopRequest(), ["a dog"])
    np.testing.assert_array_equal(seen[0].condition.null.pooled, FakeEncoder(seen[0].config.model.text).one("").pooled)
    assert [path.name for path in (workdir / "samples" / "prompts_0000002").iterdir()] == ["0000_a-dog.png"]
    record = json.loads((workdir / "samples" / "prompts_0000002.sampling.json").read_text())
    assert record["text"] == FakeEncoder(latents_of(place).model.text).encoding and record["samples"] == 1
    assert record["requested_sha256"].keys() == {"prompts"} and len(record["weights_sha256"]) == 64


@pytest.fixture(scope="module")
def pairs(place):
    """The config of three pairs of images with captions, and their encoded captions in `place / "pair_texts"`."""
    for number, level in enumerate((0, 100, 200)):
        for folder, shown in (("context", level), ("target", 255 - level)):
            (place / "pairs" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), shown, np.uint8)).save(place / "pairs" / folder / f"{number}.png")
        (place / "pairs" / "target" / f"{number}.txt").write_text(f"invert {number}\nmake {number} negative\n")
    fields = dict(data__source="captioned_pairs", data__path=str(place / "pairs"), data__channels=3, data__vae="")
    config = config_of(place, **fields, data__context_channels=3)
    encoded(place, place / "pair_texts", config)
    return fields | dict(data__context_channels=3, data__text=str(place / "pair_texts"))


def test_an_image_and_a_caption_are_conditions_together(place, pairs):
    config = config_of(place, **pairs)
    fake, experiment = FakeEncoder(config.model.text), build(config)
    source = experiment.condition.source()
    record = source[1]
    shapes = experiment.abstract_batch(1)
    assert {name: (1, *record[name].shape) for name in shapes} == {name: leaf.shape for name, leaf in shapes.items()}
    assert (record["context"] < 0).all() and (record["image"] > 0).all() and source.mirrored == ("image", "context")
    np.testing.assert_allclose(record["pooled"], fake.one("invert 1").pooled, rtol=1e-6)
    seen = [source.sample(1, np.random.default_rng(seed))["pooled"][0] for seed in range(10)]
    assert len(set(seen)) == 2 and source.stochastic
    request = experiment.condition.request()
    assert request.condition.context.shape == (3, 8, 8, 3) and request.condition.beside.states.shape[0] == 3
    assert experiment.condition.null.beside.states.any()  # the encoded empty text


def test_context_images_are_drawn_with_prompts(place, pairs):
    context = str(place / "pairs" / "context")
    config = config_of(place, **pairs)
    fake, condition = FakeEncoder(config.model.text), make_condition(config, reads=PROMPTS)
    request = condition.request_context(context, ["invert 2"])
    assert request.captions == [f"{number}: invert 2" for number in range(3)]
    for states in request.condition.beside.states:
        np.testing.assert_allclose(states, fake.one("invert 2").states, atol=1e-3)
    each = condition.request_context(context, ["invert 0", "not in the cache", "invert 2"]).condition.beside.pooled
    np.testing.assert_allclose(each[1], fake.one("not in the cache").pooled, rtol=1e-6)
    without = condition.request_context(context)
    np.testing.assert_array_equal(without.condition.beside.pooled[0], condition.null.beside.pooled)
    with pytest.raises(UserError, match="2 prompts are given for the 3 images of --context=.*one for all, or one for"):
        condition.request_context(context, ["invert 0", "invert 1"])
    with pytest.raises(UserError, match="--prompt draws texts; this model draws .*--context=FILE_OR_FOLDER"):
        condition.request(["invert 0"])
    (place / "pairs" / "target" / "1.txt").rename(place / "pairs" / "kept.txt")
    with pytest.raises(UserError, match=r"1.txt: no caption for the image 1.png"):
        condition.source()
    (place / "pairs" / "kept.txt").rename(place / "pairs" / "target" / "1.txt")


def test_beside_context_images_without_captions_is_the_empty_text(place, pairs):
    plain = pairs | dict(data__source="image_pairs", data__num_classes=1, data__text=str(place / "texts"))
    condition = make_condition(config_of(place, **plain))
    null = Encodings(str(place / "texts")).null
    record = condition.source()[0]
    for name, leaf in null._asdict().items():
        np.testing.assert_array_equal(record[name], leaf)
    drawn = condition.request_context(str(place / "pairs" / "context")).condition.beside
    np.testing.assert_array_equal(drawn.states, [null.states] * 3)
    with pytest.raises(UserError, match="--prompt draws texts; this model draws"):
        condition.request_context(str(place / "pairs" / "context"), ["a cat"])
