"""The kinds of files that users bring, malformed; the commands that read them; and what must hold after exit 0."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.campaign import malformed
from tests.campaign.commands import run
from tests.campaign.place import CAPTIONS, MAIN, PROMPTS, Jobs, fake_encoder

Files = dict[str, bytes]


class Input(NamedTuple):
    name: str
    count: int
    files: Callable[[Jobs], st.SearchStrategy[Files]]  # what is written to a folder of its own
    module: str
    arguments: Callable[[Jobs, Path, Path], list[str]]  # of that folder, and of a path for what the command writes
    wrong: Callable[[Jobs, Path, Path], str] = lambda jobs, place, out: ""  # what is wrong after exit 0, or ""
    before: Callable[[], None] = lambda: None


def write(place: Path, files: Files) -> None:
    """Writes the files below a directory; "PATH|fifo" and the like are no plain files."""
    for name, data in files.items():
        path, _, special = name.partition("|")
        target = place / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if special == "fifo":
            os.mkfifo(target)
        elif special == "loop":
            target.symlink_to(target.name)
        elif special in ("nowhere", "/dev/zero"):
            target.symlink_to(special)
        elif not path.endswith("/"):
            target.write_bytes(b"no picture" if special == "bad" else data)


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = {f"{number}.png": _png(number) for number in range(5)}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
QUESTIONS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
    'a,t,,1,0,entity,whole,"entity - whole (dog)",Is there a dog?\n'
    'a,t,,2,1,attribute,color,"attribute - color (dog, red)",Is the dog red?\n'
)
ANSWERS = {"item_id": "a", "answers": [["yes", "no"]] * 4}
RESULT = {
    "filename": "0/samples/0.png",
    "tag": "colors",
    "correct": True,
    "metadata": "{}",
    "prompt": "p",
    "reason": "",
}
GENEVAL = {"tag": "counting", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
EVALUATION = {
    **dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall"), 0.5),
    "num_images": 6, "fid_name": "FID", "intervals_95": {"fid": [0.1, 0.2]}, "images": "a.npz",
    "protocol": {"reference_sha256": "1"}, "sampling": {"diffusion_steps": 250},
}  # fmt: skip


def _named(name: str, content: st.SearchStrategy[bytes], **others: bytes) -> Callable[[Jobs], st.SearchStrategy[Files]]:
    return lambda jobs: content.map(lambda data: {name: data} | {_name(key): value for key, value in others.items()})


def _name(key: str) -> str:
    return key.replace("__", "/").replace("_", ".")


def _lines(*records: dict) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _image_folders(jobs: Jobs) -> st.SearchStrategy[Files]:
    names = st.sampled_from(("x.png", "x.jpg", "x.tif", "x.webp", "x.gif", "x.bmp", "X.PNG"))
    bad = st.dictionaries(names, malformed.images(), min_size=1, max_size=4)
    return bad.map(lambda files: _in("a", GOOD) | _in("b", {"good.png": GOOD["0.png"]} | files))


ODD = (  # path|what it is
    "b/p.png|fifo", "b/p.png|/dev/zero", "b/p.png|loop", "b/p.png|nowhere", "b/p.png/|", "c/|", "c/d/0.png|bad",
    ".hidden/h.png|bad", "__MACOSX/m.png|bad", "b/._0.png|bad", "b/Thumbs.db|bad",
)  # fmt: skip


def _odd_folders(jobs: Jobs) -> st.SearchStrategy[Files]:
    return st.sets(st.sampled_from(ODD), min_size=1, max_size=2).map(
        lambda names: _in("a", GOOD) | _in("b", GOOD) | {name: b"" for name in names}
    )


def _in(folder: str, files: Files) -> Files:
    return {f"{folder}/{name}": data for name, data in files.items()}


def _wrong_latents(jobs: Jobs, place: Path, out: Path) -> str:
    """The first shard holds the five good images of the first class, whatever else there is."""
    if not (out / "manifest.json").exists():
        return "there is no manifest"
    good = place.parent / "good_latents"
    if not good.exists():
        folder = place.parent / "good"
        write(folder, _in("a", GOOD) | _in("b", GOOD))
        run(MAIN, *jobs.prepare(good, "prepare", f"--config.data.path={folder}"))
    name = "latents-00000.array_record"
    return "" if (out / name).read_bytes() == (good / name).read_bytes() else "the good images have other latents"


def _wrong_folder(jobs: Jobs, place: Path, out: Path) -> str:
    passed_over = (place / "c" / "d").exists()
    return "passes over the images in c/d" if passed_over else _wrong_latents(jobs, place, out)


def _wrong_prompts(jobs: Jobs, place: Path, out: Path) -> str:
    data = (place / "prompts.txt").read_bytes().decode("utf-8-sig")
    wanted = [line.strip() for line in data.split("\n") if line.strip()]
    return _wrong_captions(out, [[line] for line in wanted])


def _wrong_caption_folder(jobs: Jobs, place: Path, out: Path) -> str:
    lines = (place / "captions.jsonl").read_bytes().decode("utf-8-sig").split("\n")
    records = [json.loads(line) for line in lines if line.strip()]
    wanted = [record.get("captions", [record.get("caption")]) for record in records]
    return _wrong_captions(out, [[text.strip() for text in texts if text.strip()] for texts in wanted])


def _wrong_captions(out: Path, wanted: list[list[str]]) -> str:
    shards = [json.loads(path.read_text()) for path in sorted(out.glob("texts-*.json"))]
    found = [captions for shard in shards for _, captions in shard["items"]][1:]
    return "" if found == wanted else f"encodes {found}, not {wanted}"


def _wrong_weights(jobs: Jobs, place: Path, out: Path) -> str:
    name = "model.safetensors"
    return "" if (out / name).read_bytes() == (jobs.root / "dit" / name).read_bytes() else "has other weights"


def _wrong_export(jobs: Jobs, place: Path, out: Path) -> str:
    """The tensors must be those of the weights, which have not changed."""
    good = place.parent / "good_export"
    if not good.exists():
        run(MAIN, *_export(jobs, jobs.root / "dit", good))
    found, wanted = ([path.read_bytes() for path in sorted(of.rglob("*.safetensors"))] for of in (out, good))
    return "" if found == wanted else "has other tensors"


def _export(jobs: Jobs, place: Path, out: Path) -> list[str]:
    return ["--mode=convert", f"--from={place}", f"--to={out}", "--to-layout=dit"]


def _wrong_torch(jobs: Jobs, place: Path, out: Path) -> str:
    return "converts what is no weights"


def _quick_inception() -> None:
    """A projection in place of the network: these inputs are about files."""
    from trm_diffusion.jobs import evaluate_images
    from trm_diffusion.metrics import adm
    from trm_diffusion.models.inception import Features

    def project(weights, batch):
        flat = np.asarray(batch, np.float32).reshape(len(batch), -1)[:, :48] / 64
        return Features(flat[:, :20], flat[:, :12], flat[:, :10])

    adm._forward, adm.POOL_WIDTH, adm.SPATIAL_WIDTH = project, 20, 12
    evaluate_images.load_inception = lambda path: ({}, "0" * 64)


def _npz(jobs: Jobs) -> st.SearchStrategy[Files]:
    return malformed.arrays({"arr_0": PIXELS, "arr_1": np.arange(6) // 3}).map(lambda data: {"images.npz": data})


def _reference(jobs: Jobs) -> st.SearchStrategy[Files]:
    pool, spatial = np.random.default_rng(0).standard_normal((2, 30, 20))
    arrays = {"arr_0": PIXELS, "mu": pool.mean(0), "sigma": np.cov(pool.T), "mu_s": spatial[:, :12].mean(0)}
    arrays |= {"sigma_s": np.cov(spatial[:, :12].T)}
    return malformed.arrays(arrays).map(lambda data: {"reference.npz": data})


def _side_files(jobs: Jobs) -> st.SearchStrategy[Files]:
    """Latents or texts with one JSON file malformed."""

    def of(directory: str) -> st.SearchStrategy[Files]:
        whole = {path.name: path.read_bytes() for path in (jobs.root / directory).iterdir() if path.is_file()}
        names = st.sampled_from(sorted(name for name in whole if name.endswith(".json")))
        return names.flatmap(
            lambda name: malformed.json_files(json.loads(whole[name])).map(lambda data: whole | {name: data})
        )

    return st.sampled_from(("latents", "texts")).flatmap(of)


def _manifests(jobs: Jobs) -> st.SearchStrategy[Files]:
    whole = {path.name: path.read_bytes() for path in (jobs.root / "dit").iterdir() if path.is_file()}
    record = json.loads(whole["manifest.json"])
    return malformed.json_files(record).map(lambda data: whole | {"manifest.json": data})


def _published(jobs: Jobs) -> st.SearchStrategy[Files]:
    data = (jobs.root / "dit.safetensors").read_bytes()
    return malformed.safetensors(data).map(lambda data: {"dit.safetensors": data})


def _configs(jobs: Jobs) -> st.SearchStrategy[Files]:
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "sample_size": 8}
    weights = (jobs.root / "dit.safetensors").read_bytes()
    return malformed.json_files(config).map(
        lambda data: {"config.json": data, "diffusion_pytorch_model.safetensors": weights}
    )


def _indices(jobs: Jobs) -> st.SearchStrategy[Files]:
    weights = (jobs.root / "dit.safetensors").read_bytes()
    names = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    index = {"metadata": {}, "weight_map": dict.fromkeys(list(names)[:4], "part.safetensors")}
    return malformed.json_files(index).map(
        lambda data: {"model.safetensors.index.json": data, "part.safetensors": weights}
    )


def _prepare(source: str) -> Callable[[Jobs, Path, Path], list[str]]:
    return lambda jobs, place, out: jobs.prepare(
        out, "prepare", f"--config.data.source={source}", f"--config.data.path={place}"
    )


def _convert(name: str = "") -> Callable[[Jobs, Path, Path], list[str]]:
    return lambda jobs, place, out: ["--mode=convert", f"--from={place / name}", f"--to={out}"]


def _evaluate(images: str, reference: str) -> Callable[[Jobs, Path, Path], list[str]]:
    def arguments(jobs: Jobs, place: Path, out: Path) -> list[str]:
        for name, arrays in (("images", {"arr_0": PIXELS}), ("reference", _good_reference())):
            if not (place / f"{name}.npz").exists():
                np.savez(place / f"{name}.npz", **arrays)
        files = [f"--images={place / images}", f"--reference={place / reference}"]
        return ["--mode=evaluate", *files, "--inception=none", f"--out={out}.json"]

    return arguments


def _good_reference() -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).standard_normal((30, 20))
    moments = {"mu": values.mean(0), "sigma": np.cov(values.T)}
    return moments | {"mu_s": values[:, :12].mean(0), "sigma_s": np.cov(values[:, :12].T), "arr_0": PIXELS}


def _encode(*flags: str) -> Callable[[Jobs, Path, Path], list[str]]:
    return lambda jobs, place, out: jobs.encode(out) + [flag.format(place=place) for flag in flags]


TARS = st.integers(0, 1).flatmap(
    lambda labelled: malformed.tars(GOOD | ({name.replace("png", "cls"): b"1" for name in GOOD} if labelled else {}))
)
CAPTION_LINES = _lines(*({"file": name, "captions": some} for name, some in zip(GOOD, CAPTIONS, strict=True)))
CAPTION_FILE = st.one_of(
    malformed.damaged(CAPTION_LINES),
    malformed.text_files(CAPTION_LINES.decode().splitlines()),
    malformed.edited({"file": "0.png", "captions": ["a"]}).map(lambda record: json.dumps(record).encode() + b"\n"),
)
INPUTS = (
    Input("images", 14, _image_folders, MAIN, _prepare("image_folder"), _wrong_latents),
    Input("folders", 8, _odd_folders, MAIN, _prepare("image_folder"), _wrong_folder),
    Input("tars", 14, _named("a.tar", TARS), MAIN, _prepare("image_tars")),
    Input(
        "captions",
        14,
        lambda jobs: CAPTION_FILE.map(lambda data: GOOD | {"captions.jsonl": data}),
        MAIN,
        _encode("--config.data.path={place}"),
        _wrong_caption_folder,
        fake_encoder,
    ),
    Input(
        "prompts",
        10,
        _named("prompts.txt", malformed.text_files(PROMPTS)),
        MAIN,
        _encode("--prompts={place}/prompts.txt"),
        _wrong_prompts,
        fake_encoder,
    ),
    Input(
        "GenEval's results",
        8,
        _named("results.jsonl", malformed.json_files(RESULT)),
        "trm_diffusion.metrics.geneval",
        lambda jobs, place, out: ["--results", str(place / "results.jsonl")],
    ),
    Input(
        "GenEval's prompts",
        8,
        _named("prompts.jsonl", malformed.json_files(GENEVAL)),
        "trm_diffusion.metrics.geneval",
        lambda jobs, place, out: ["--prompts", str(place / "prompts.jsonl"), "--images", str(place)],
    ),
    Input(
        "DPG's questions",
        10,
        _named("q.csv", malformed.damaged(QUESTIONS.encode()), a_jsonl=_lines(ANSWERS)),
        "trm_diffusion.metrics.dpg",
        lambda jobs, place, out: ["--questions", str(place / "q.csv"), "--answers", str(place / "a.jsonl")],
    ),
    Input(
        "DPG's answers",
        10,
        _named("a.jsonl", malformed.json_files(ANSWERS), q_csv=QUESTIONS.encode()),
        "trm_diffusion.metrics.dpg",
        lambda jobs, place, out: ["--questions", str(place / "q.csv"), "--answers", str(place / "a.jsonl")],
    ),
    Input(
        "evaluations",
        10,
        _named("a.json", malformed.json_files(EVALUATION), b_json=_lines(EVALUATION)),
        MAIN,
        lambda jobs, place, out: ["--mode=compare", f"--evaluations={place}/a.json,{place}/b.json", f"--out={out}"],
    ),
    Input("manifests of shards", 12, _side_files, MAIN, lambda jobs, place, out: jobs.verify(place)),
    Input("manifests of weights", 10, _manifests, MAIN, _export, _wrong_export),
    Input("npz of images", 12, _npz, MAIN, _evaluate("images.npz", "reference.npz"), before=_quick_inception),
    Input(
        "npz of a reference", 10, _reference, MAIN, _evaluate("images.npz", "reference.npz"), before=_quick_inception
    ),
    Input("safetensors", 25, _published, MAIN, _convert("dit.safetensors"), _wrong_weights),
    Input("config.json of weights", 6, _configs, MAIN, _convert()),
    Input("indices of weights", 8, _indices, MAIN, _convert()),
    Input("PyTorch files", 4, _named("w.pt", malformed.torch_files()), MAIN, _convert("w.pt"), _wrong_torch),
)
