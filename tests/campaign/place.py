"""What the cases start from: tiny configs, pictures, weights, and the commands of every job.

    python -m tests.campaign.place DIRECTORY

writes the configs, pictures, prompts and weights; `make` also runs the jobs that others read from.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.campaign.commands import succeed
from tests.jobs.encoders import FakeEncoder
from tests.jobs.tiny import text_config, tiny_config, write_tiny_vae
from tests.weights.published import random_tensors, write
from trm_diffusion.config import to_dict

MAIN = "trm_diffusion.main"
UPDATES, MORE, IMAGES = 6, 8, 11
DIT = dict(
    depth=2, width=16, heads=2, patch=4, mlp_ratio=4.0, image_size=8, in_channels=1, out_channels=1, num_classes=10
)
CAPTIONS = [["a cat", "one cat"], ["a dog"], ["two birds", "birds"], ["a cat"], ["grey"]]
PROMPTS = ["a red circle", "two blue squares", "a green cross", "three red circles"]


def fake_encoder() -> None:
    """Encodes texts with `FakeEncoder` in this process: the pretrained ones need packages that tests lack."""
    from trm_diffusion.conditions import encoded_text
    from trm_diffusion.jobs import encode_text

    encode_text.PretrainedEncoder = encoded_text.PretrainedEncoder = FakeEncoder


def write_inputs(root: Path) -> None:
    """Writes everything that no job makes."""
    vae = write_tiny_vae(root / "vae")
    _pictures(root / "classes", [f"{label}/{i}.png" for label in "ab" for i in range(6)])
    names = [f"{i}.png" for i in range(len(CAPTIONS))]
    _pictures(root / "captioned", names)
    lines = [json.dumps({"file": name, "captions": some}) for name, some in zip(names, CAPTIONS, strict=True)]
    (root / "captioned" / "captions.jsonl").write_text("\n".join(lines) + "\n")
    include = [{"class": "circle", "count": 1}]
    lines = [json.dumps({"tag": "counting", "include": include, "prompt": prompt}) for prompt in PROMPTS]
    (root / "geneval.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"item_id": f"item{number}", "prompt": prompt}) for number, prompt in enumerate(PROMPTS)]
    (root / "dpg.jsonl").write_text("\n".join(lines) + "\n")
    write(root / "dit.safetensors", random_tensors("dit", DIT, scale=0.3))

    run = dict(train__updates=UPDATES, checkpoint__every=2)
    _config(root, "labels", tiny_config(**run, evaluate__label_rule="random", sample__batch_size=4))
    plain = dict(model__recursion__blocks="none", diffusion__objective="rectified_flow", sample__guidance=1.0)
    _config(root, "plain", tiny_config(**plain, sample__parameters="raw"))
    wide = dict(data__image_size=32, model__patch=16, model__text__vocabulary=80, train__updates=2)
    _config(root, "words", text_config(**wide))
    latents = dict(data__channels=4, data__vae=vae, train__updates=2)
    folder = dict(data__source="image_folder", data__path=str(root / "classes"), data__flip=True)
    _config(root, "prepare", tiny_config(**latents | folder, data__num_classes=2))
    latent = dict(data__source="latents", data__path=str(root / "latents"))
    _config(root, "latents", tiny_config(**latents | latent, data__num_classes=2))
    text = dict(model__text__encoder="encoded", model__text__pretrained="some/encoder", sample__per_class=1)
    text |= latents | dict(data__num_classes=0, model__text__pooled_features=6)
    folder |= dict(data__source="caption_folder", data__path=str(root / "captioned"))
    _config(root, "encode", text_config(**text | folder))
    latent |= dict(data__path=str(root / "captioned_latents"), data__text=str(root / "texts"))
    _config(root, "texts", text_config(**text | latent))


def _config(root: Path, name: str, config) -> None:
    text = f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({to_dict(config)!r})\n"
    (root / f"{name}.py").write_text(text)


def _pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


class Jobs:
    """The arguments of `python -m trm_diffusion.main` for each job, with the inputs in `root`."""

    def __init__(self, root: Path):
        self.root = root

    def _of(self, config: str, *arguments: str) -> list[str]:
        cache = [] if any("compilation_cache" in argument for argument in arguments) else [self.cache]
        return [f"--config={self.root / f'{config}.py'}", *cache, *arguments]

    @property
    def cache(self) -> str:
        return f"--compilation_cache={self.root / 'cache'}"

    def train(self, run: Path, config: str = "labels", *more: str) -> list[str]:
        return self._of(config, f"--workdir={run}", *more)

    def sample(self, run: Path, config: str = "labels", *more: str) -> list[str]:
        return self._of(config, f"--workdir={run}", "--mode=sample", *more)

    def images(self, run: Path, out: Path) -> list[str]:
        return self.sample(run, "labels", f"--num={IMAGES}", f"--out={out}")

    def export(self, run: Path, out: Path, benchmark: str) -> list[str]:
        prompts = f"--prompts={self.root / f'{benchmark}.jsonl'}"
        return self.sample(run, "words", f"--export={benchmark}", prompts, f"--out={out}")

    def prepare(self, out: Path, config: str = "prepare", *more: str) -> list[str]:
        return self._of(config, "--mode=prepare", "--images_per_shard=5", f"--out={out}", *more)

    def encode(self, out: Path) -> list[str]:
        return self._of("encode", "--mode=encode", "--images_per_shard=2", f"--out={out}")

    def verify(self, directory: Path) -> list[str]:
        return ["--mode=verify", f"--out={directory}"]


def make(root: Path, *, whole: bool = True) -> Jobs:
    """Writes the inputs and runs the jobs that others read from; whole=False leaves out what the slice does not use."""
    jobs = Jobs(root)
    if (root / "made").exists():
        return jobs
    succeed("tests.campaign.place", str(root))
    succeed(MAIN, *jobs.train(root / "run"))
    succeed(MAIN, *jobs.prepare(root / "latents"))
    succeed(MAIN, *jobs.images(root / "run", root / "images"))
    succeed(MAIN, "--mode=convert", f"--from={root / 'dit.safetensors'}", f"--to={root / 'dit'}")
    if whole:
        succeed(MAIN, *jobs.prepare(root / "captioned_latents", "encode"))
        succeed(MAIN, *jobs.encode(root / "texts"), before=fake_encoder)
        succeed(MAIN, *jobs.train(root / "latents_run", "latents"))
        succeed(MAIN, *jobs.train(root / "texts_run", "texts"), before=fake_encoder)
        succeed(MAIN, *jobs.train(root / "words_run", "words"))
        for benchmark in ("geneval", "dpg"):
            succeed(MAIN, *jobs.export(root / "words_run", root / benchmark, benchmark))
    (root / "made").touch()
    return jobs


if __name__ == "__main__":
    write_inputs(Path(sys.argv[1]))
