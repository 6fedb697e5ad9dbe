"""A JSON file beside an artefact that is cut, or of another form, is one line that names the file."""

import json

import pytest
from etils import epath

from trm_diffusion.conditions.words import load_words
from trm_diffusion.config import default_config, resolve
from trm_diffusion.data import encodings, latents
from trm_diffusion.errors import UserError
from trm_diffusion.jobs.compare import read_evaluation
from trm_diffusion.metrics import dpg, geneval
from trm_diffusion.run.decoder import kept_spec
from trm_diffusion.run.drawn_set import check_record
from trm_diffusion.run.prompts import read_prompts
from trm_diffusion.run.workdir import load_config, save_config
from trm_diffusion.weights.store import load_weights

READERS = {  # file: how it is read from its folder, and a value of another form
    "config.json": (load_config, {"format": "1", "config": {}}),
    "latent.json": (kept_spec, {"vae_id": "x", "scale": "1", "shift": 0, "channels": 4, "size": 8}),
    "words.json": (load_words, {"vocabulary": "red dog", "captions": []}),
    "sampling.json": (lambda folder: check_record(folder / "sampling.json", folder, {"seed": 0}), ["seed"]),
    "evaluation.json": (lambda folder: read_evaluation(str(folder / "evaluation.json")), [3]),
    "manifest.json": (latents.read_manifest, {"format_version": 1, "shards": {}}),
    "prompts.jsonl": (lambda folder: read_prompts(str(folder / "prompts.jsonl")), {"prompt": ["a", "b"]}),
    "tags.jsonl": (
        lambda folder: geneval.read_prompts(folder / "tags.jsonl"), {"tag": ["colors"], "include": [], "prompt": "a"}
    ),
    "answers.jsonl": (lambda folder: dpg.read_answers(folder / "answers.jsonl"), {"item_id": "a", "answers": ["yes"]}),
    "dpg.jsonl": (lambda folder: dpg.read_prompts(folder / "dpg.jsonl"), {"item_id": "a", "prompt": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_cut_and_mistyped_files_are_named(tmp_path, name):
    read, wrong = READERS[name]
    for content in ('{"a": [1, 2', json.dumps(wrong), "caf\xe9".encode("latin-1"), b""):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=name) as caught:
            read(epath.Path(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [encodings.read_manifest, load_weights])
def test_other_manifests_are_checked_too(tmp_path, read):
    for content in ("{", "3", '{"format": "1"}', '{"format": 1, "format_version": 1, "kind": 3, "encoding": []}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="manifest.json: "):
            read(str(tmp_path))


def test_a_field_of_a_saved_config_is_named_with_its_file(tmp_path):
    save_config(epath.Path(tmp_path), resolve(default_config()))
    assert load_config(epath.Path(tmp_path)) == resolve(default_config())
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    record["config"]["seed"] = "zero"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="config.json: config.seed takes a int, not 'zero'"):
        load_config(epath.Path(tmp_path))
