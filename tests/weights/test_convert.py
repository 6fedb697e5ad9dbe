"""Published weights are imported and exported exactly, in every dtype; a faulty file gives a one-line error."""

import hashlib
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from tests.full_disk import full_disk
from tests.jobs.tiny import command, finished, tiny_config
from tests.weights.published import random_tensors, write
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.convert_weights import convert
from trm_diffusion.machine import machine
from trm_diffusion.models.inception import random_state
from trm_diffusion.run.restore import restore_or_init
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.weights.convert import LAYOUTS, detect, to_ours
from trm_diffusion.weights.inception import load_inception
from trm_diffusion.weights.safetensors import read_safetensors
from trm_diffusion.weights.source import open_source
from trm_diffusion.weights.store import load_weights

DIT = dict(
    depth=2, width=16, heads=2, patch=2, mlp_ratio=4.0, image_size=8, in_channels=4, out_channels=8, num_classes=10
)  # fmt: skip
VAE = dict(
    channels=[4, 8], blocks=1, image_channels=3, latent_channels=4, quant_conv=True, groups=2, scale=0.18215, shift=0.0
)  # fmt: skip
SD3 = dict(
    depth=3, width=16, heads=2, patch=2, mlp_ratio=4.0, qk_norm=True, dual_attention_blocks=1, position_max_size=6,
    position_base_size=4, image_size=8, in_channels=4, out_channels=4, text_features=6, pooled_features=5
)  # fmt: skip
MODELS = {"dit": DIT, "mmdit": SD3, "vae": VAE, "inception": {}}


def published(layout_name: str, dtype=np.float32) -> dict[str, np.ndarray]:
    return random_tensors(layout_name, MODELS[LAYOUTS[layout_name].kind], dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_and_out_again_is_the_same_file(layout, tmp_path):
    dtypes = {"sit": np.float16, "single-file-vae": ml_dtypes.bfloat16, "dit": ml_dtypes.float8_e4m3fn}
    dtype = dtypes.get(layout, np.float32)
    tensors = published(layout, dtype)
    config = LAYOUTS[layout.replace("single-file", "diffusers")].config
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config(MODELS[LAYOUTS[layout].kind])))
    name = write(tmp_path / "weights.safetensors", tensors)
    convert(name, str(tmp_path / "ours"), layout=layout)
    convert(str(tmp_path / "ours"), str(tmp_path / "again"), to_layout=layout)
    (file,) = (tmp_path / "again").glob("*.safetensors")
    again = read_safetensors(file)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == dtype
        np.testing.assert_array_equal(again[name], tensor)
    manifest = json.loads((tmp_path / "ours/manifest.json").read_text())
    told = MODELS[manifest["kind"]].items() if config else []  # without it, the heads are guessed from the size
    assert manifest["layout"] == layout and all(manifest["model"][name] == value for name, value in told)
    assert manifest["files"] == [
        {
            "file": "weights.safetensors",
            "sha256": hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest(),
        }
    ]
    ours = read_safetensors(tmp_path / "ours/model.safetensors")
    assert manifest["parameters"] == sum(tensor.size for tensor in ours.values())


def spoiled(tensors, fault):
    name = next(
        name for name in tensors if name.endswith(("blocks.1.attn.proj.weight", "mid_block.resnets.0.conv1.weight"))
    )
    match fault:
        case "missing":
            del tensors[name]
        case "unexpected":
            tensors["blocks.1.attn.extra.weight"] = np.zeros(3, np.float32)
        case "misshapen":
            tensors[name] = tensors[name][:-1]
        case "not finite":
            tensors[name] = tensors[name].copy()
            tensors[name].flat[5] = np.inf
        case "integers":
            tensors[name] = tensors[name].astype(np.int32)
    return tensors


@pytest.mark.parametrize("layout", ["dit", "diffusers-vae"])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("missing", r"(proj|conv1).weight is missing$"),
        ("unexpected", "blocks.1.attn.extra.weight is unexpected$"),
        ("misshapen", r"weight has shape \(\d+, .*\), not \(\d+, .*\)$"),
        ("not finite", "weight holds values that are not finite$"),
        ("integers", "weight holds int32, which are not weights$"),
        ("truncated", "weights.safetensors is truncated: .* fetch it again$"),
        ("truncated header", "is not a safetensors file, or is truncated in its header"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line_and_nothing_is_written(layout, fault, message, tmp_path):
    path = tmp_path / "weights.safetensors"
    name = write(path, spoiled(published(layout), fault))
    if fault.startswith("truncated"):
        content = path.read_bytes()
        path.write_bytes(content[:200] if "header" in fault else content[:-100])
    with pytest.raises(UserError, match=message) as error:
        convert(name, str(tmp_path / "ours"))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_line_and_what_a_killed_job_left_is_cleared(tmp_path):
    name = write(tmp_path / "weights.safetensors", published("dit"))
    left = tmp_path / f".ours.partial-{machine()}-{2**30}"  # no process has this number
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with full_disk(5000), pytest.raises(UserError, match=f"{tmp_path}/ours cannot be written .File too large.: free"):
        convert(name, str(tmp_path / "ours"))
    with pytest.raises(UserError, match="ours cannot be written .*a file is where a folder should be"):
        convert(name, str(tmp_path / "weights.safetensors" / "ours"))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_problems_are_listed_and_counted(tmp_path):
    tensors = published("dit")
    lacking = [name for name in tensors if "blocks.1.mlp" in name or "blocks.1.attn" in name]
    name = write(tmp_path / "weights.safetensors", {key: value for key, value in tensors.items() if key not in lacking})
    with pytest.raises(UserError, match="; and 4 more$") as error:
        convert(name, str(tmp_path / "ours"))
    assert str(error.value).count("is missing") == 4


def test_copies_that_differ_and_tables_that_are_not_ours_are_refused(tmp_path):
    tensors = published("diffusers-dit")
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[name] = tensors[name] + 1
    path = write(tmp_path / "weights.safetensors", tensors)
    with pytest.raises(UserError, match="norm1.emb.timestep_embedder.linear_2.bias and 1 others: they are not equal"):
        convert(path, str(tmp_path / "ours"))
    tensors = published("dit")
    tensors["pos_embed"] = tensors["pos_embed"][:, ::-1]
    path = write(tmp_path / "weights.safetensors", tensors)
    with pytest.raises(UserError, match="pos_embed is not the table that this model computes"):
        convert(path, str(tmp_path / "ours"))


def test_the_layout_is_told_by_the_names(tmp_path):
    for layout in LAYOUTS:
        source = open_source(write(tmp_path / "weights.safetensors", published(layout)))
        assert detect(source)[0].name == {"sit": "dit"}.get(layout, layout)
    path = write(tmp_path / "weights.safetensors", published("dit") | published("single-file-vae"))
    with pytest.raises(UserError, match="more than one model; choose with --layout=dit or --layout=single-file-vae"):
        convert(path, str(tmp_path / "ours"))
    path = write(tmp_path / "weights.safetensors", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="is not in the layout dit, sit, .*; its 1 tensors begin with weight"):
        convert(path, str(tmp_path / "ours"))
    with pytest.raises(UserError, match="--layout=nothing is none of dit, sit"):
        convert(path, str(tmp_path / "ours"), layout="nothing")


def test_other_models_of_a_single_file_stay_out(tmp_path):
    """Text encoders and the transformer share the file, under their own prefixes; a stray tensor is refused."""
    beside = {"model.diffusion_model.pos": np.zeros(3, np.float32), "text_encoders.clip_l.x": np.zeros(3, np.float32)}
    path = write(tmp_path / "weights.safetensors", published("single-file-vae") | beside)
    assert to_ours(open_source(path)).kind == "vae"
    path = write(tmp_path / "weights.safetensors", published("single-file-vae") | {"stray": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="stray is unexpected"):
        to_ours(open_source(path))


def test_inception_by_file_and_by_directory_is_the_same_network(tmp_path):
    """Counters of batch norms are not weights: they are listed, and not needed."""
    state = random_state(0)
    counters = {f"{layer}.bn.num_batches_tracked": np.zeros((), np.int64) for layer in ("Conv2d_1a_3x3", "Mixed_5b.x")}
    path = write(tmp_path / "weights.safetensors", state | counters)
    convert(path, str(tmp_path / "ours"))
    manifest = json.loads((tmp_path / "ours/manifest.json").read_text())
    assert sorted(manifest["unused"]) == sorted(counters) and manifest["kind"] == "inception"
    one, other = load_inception(path), load_inception(str(tmp_path / "ours"))
    assert one[1] == other[1] == manifest["files"][0]["sha256"]
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])


def test_shards_with_an_index(tmp_path):
    tensors, index = published("dit"), {}
    for part, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{part}.safetensors"
        write(tmp_path / file, {name: tensors[name] for name in names})
        index |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = to_ours(open_source(str(tmp_path)))
    assert len(weights.record["files"]) == 2
    whole = to_ours(open_source(write(tmp_path / "whole.safetensors", tensors)))
    for (name, one), (_, other) in zip(weights.tensors(), whole.tensors(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="model-1.safetensors is missing, but model.safetensors.index.json lists it"):
        open_source(str(tmp_path))


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "weights.pt").write_bytes(b"")
    for name, message in (
        ("weights.pt", "weights.pt needs PyTorch to be read; pip install -r requirements-torch.txt"),
        ("none.safetensors", "none.safetensors: no such file or directory$"),
        (".", "holds no .safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))
    with pytest.raises(UserError, match="owner/name: no such file or directory; .* pip install huggingface_hub"):
        open_source("owner/name")


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(repository, allow_patterns):
            asked.append((repository, allow_patterns))
            if repository == "owner/closed":
                raise OSError("401: log in first")
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    (tmp_path / "vae").mkdir()
    write(tmp_path / "vae/diffusion_pytorch_model.safetensors", published("diffusers-vae"))
    assert to_ours(open_source("owner/name/vae")).kind == "vae"
    assert asked[0][0] == "owner/name" and "vae/*.safetensors" in asked[0][1]
    with pytest.raises(UserError, match=r"owner/closed: .* the download from the hub failed \(401: log in first\)"):
        open_source("owner/closed")


def test_a_converted_directory_starts_a_run_which_goes_out_again(tmp_path):
    """A run that starts from bfloat16 weights is exported to the same tensors, in float32."""
    tensors = published("dit", ml_dtypes.bfloat16)
    path = write(tmp_path / "weights.safetensors", tensors)
    finished(command("--mode=convert", f"--from={path}", f"--to={tmp_path / 'ours'}"))
    assert "exists already" in finished(command("--mode=convert", f"--from={path}", f"--to={tmp_path / 'ours'}"), 2)[1]
    fits = dict(data__source="synthetic", data__image_size=8, data__channels=4, model__patch=2)
    fits |= dict(diffusion__objective="ddpm", diffusion__learned_sigma=True, init__workdir=str(tmp_path / "ours"))
    started(tiny_config(**fits, model__recursion__blocks="none"), tmp_path / "run")
    convert(str(tmp_path / "run"), str(tmp_path / "out"), to_layout="dit")
    out = read_safetensors(tmp_path / "out/model.safetensors")
    assert out.keys() == tensors.keys()
    for name in tensors.keys() - {"pos_embed"}:
        np.testing.assert_array_equal(out[name], tensors[name].astype(np.float32))

    with pytest.raises(UserError, match="has in_channels 4, this config 3"):
        started(tiny_config(**fits | {"data__channels": 3}), tmp_path / "other")
    started(tiny_config(**fits, init__missing="*/recursion/*"), tmp_path / "tuned")
    with pytest.raises(UserError, match="recursion/.* has no place in the layout dit"):
        convert(str(tmp_path / "tuned"), str(tmp_path / "refused"), to_layout="dit")
    started(tiny_config(**fits, model__recursion__looped=True), tmp_path / "looped")
    with pytest.raises(UserError, match="the loop of config.model.recursion.looped has no place in the layout dit"):
        convert(str(tmp_path / "looped"), str(tmp_path / "refused"), to_layout="dit")
    with pytest.raises(UserError, match="cannot be merged exactly with .*looped True"):
        convert(str(tmp_path / "looped"), str(tmp_path / "refused"), merge=True)
    with pytest.raises(UserError, match="holds a dit; the layout diffusers-vae is for a vae"):
        convert(str(tmp_path / "run"), str(tmp_path / "refused"), to_layout="diffusers-vae")
    assert not (tmp_path / "refused").exists()


def started(config, workdir):
    """Saves a run as it is before its first update."""
    options = dict(seed=0, batch_size=8)
    iterator = make_iterator(make_source(config.data), config.data, **options)
    workdir, experiment = epath.Path(workdir), build(config)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state, loop = restore_or_init(experiment, workdir, checkpoints, iterator)
        checkpoints.save(0, state, iterator, loop or {"start": 0})
    iterator.close()


def test_converted_weights_that_have_changed_since_are_refused(tmp_path):
    convert(write(tmp_path / "weights.safetensors", published("dit")), str(tmp_path / "ours"))
    path, manifest = (tmp_path / "ours" / name for name in ("model.safetensors", "manifest.json"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is damaged: it is not what manifest.json says") as error:
        load_weights(tmp_path / "ours")
    assert "\n" not in str(error.value)
    record = json.loads(manifest.read_text())
    for change in ({"width": None}, {"image_size": 4}):
        manifest.write_text(json.dumps({**record, "model": {**record["model"], **change}}))
        with pytest.raises(UserError, match="manifest.json is damaged: it names another model"):
            load_weights(tmp_path / "ours")
    del record["sha256"], record["model_sha256"]  # as earlier versions wrote it
    manifest.write_text(json.dumps(record))
    assert load_weights(tmp_path / "ours").kind == "dit"


def test_another_dtype_where_asked_and_where_it_holds_the_values(tmp_path):
    tensors = published("dit")
    path = write(tmp_path / "weights.safetensors", tensors)
    convert(path, str(tmp_path / "ours"))
    convert(str(tmp_path / "ours"), str(tmp_path / "half"), dtype="bfloat16")
    weights = load_weights(tmp_path / "half")
    assert {spec.dtype for spec in weights.specs.values()} == {np.dtype(ml_dtypes.bfloat16)}
    expected = tensors["blocks.0.attn.qkv.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(weights.read("stack/blocks/0/attention/qkv/kernel"), expected)
    tensors["x_embedder.proj.bias"][0] = 1e6
    path = write(tmp_path / "large.safetensors", tensors)
    with pytest.raises(UserError, match="patch_embed/bias holds values beyond float16"):
        convert(path, str(tmp_path / "refused"), dtype="float16")
    assert not (tmp_path / "refused").exists()
