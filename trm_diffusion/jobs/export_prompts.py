"""The export job for prompt benchmarks: four images per prompt, in the layout that the benchmark's evaluator reads.

Image i of prompt p depends only on the prompt, `sample.seed` and its index 4 p + i. Prompts are drawn in groups, the
same in every start of the job. Files are written atomically, and a group that lacks a sound image is drawn again, so an
interrupted export ends with the same bytes.

OUT                  the images, in the layout of `metrics/geneval.py` or `metrics/dpg.py`
OUT.sampling.json    how they were drawn; see run/drawn_set.py
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from etils import epath

from trm_diffusion.analysis.grids import to_uint8
from trm_diffusion.conditions import PROMPTS, TEXTS, kind_of
from trm_diffusion.config import Config
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment
from trm_diffusion.files import clear_partial, sha256_of_json
from trm_diffusion.jobs.export_images import require_images
from trm_diffusion.jobs.sample import draw_all, make_sample_fn
from trm_diffusion.metrics import dpg, geneval
from trm_diffusion.readers.paths import any_path, local_path
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.decoder import load_decoder
from trm_diffusion.run.drawn_set import DrawnSet
from trm_diffusion.run.protocol import set_record
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import is_main_process
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState

IMAGES = 4  # images per prompt, in both benchmarks


class Benchmark(NamedTuple):
    """The prompts of a benchmark, and its layout of a folder of images."""

    texts: list[str]
    names: list[list[str]]  # of the image files of each prompt, relative to the folder
    write: Callable[[DrawnSet, int, np.ndarray], None]  # writes the images uint8 [4, H, W, 3] of a prompt
    write_texts: Callable[[pathlib.Path], None]  # writes the other files that are missing or wrong
    check: Callable[[pathlib.Path], object]  # raises UserError for a missing or an extra file


def _geneval(path: str) -> Benchmark:
    prompts = geneval.read_prompts(path)
    numbers = range(len(prompts))
    names = [[geneval.image_path("", prompt, image).as_posix() for image in range(IMAGES)] for prompt in numbers]

    def write(drawn, prompt, images):
        for image, pixels in enumerate(images):
            mark = drawn.mark(names[prompt][image])
            geneval.write_image(drawn.folder, prompts, prompt, image, pixels, mark)

    def write_texts(folder):
        for prompt in numbers:
            geneval.write_metadata(folder, prompts, prompt)

    return Benchmark(
        [prompt["prompt"] for prompt in prompts],
        names,
        write,
        write_texts,
        lambda folder: geneval.check_export(folder, prompts),
    )


def _dpg(path: str) -> Benchmark:
    prompts = dpg.read_prompts(path)
    item_ids = list(prompts)
    names = [f"{item_id}.png" for item_id in item_ids]

    def write(drawn, prompt, images):
        dpg.write_grid(drawn.folder, item_ids[prompt], images, drawn.mark(names[prompt]))

    return Benchmark(
        list(prompts.values()),
        [[name] for name in names],
        write,
        lambda folder: None,
        lambda folder: dpg.check_export(folder, item_ids),
    )


def export_prompts(
    config: Config, workdir: epath.Path, stop: StopRequest, *, benchmark: str, prompts: str, out: str = ""
) -> None:
    """Draws the images of a benchmark from the run in `workdir`, with the settings of `sample`.

    Args:
      benchmark: geneval or dpg.
      prompts: the user's copy of the benchmark's prompts.
      out: the folder to write; workdir/samples/BENCHMARK_UPDATE by default.

    Raises:
      UserError: a model of labels, latents without an autoencoder, malformed prompts, or a folder that holds something
        else or is in use.
      Interrupted: asked to stop; the images drawn so far are kept.
    """
    kind_of(config).require(TEXTS, f"--export={benchmark}")
    require_images(config)
    if "://" in (out or str(workdir)):
        raise UserError(
            f"--export={benchmark} writes local files for the benchmark's evaluator: give --out=DIR, a local directory"
        )
    suite = {"geneval": _geneval, "dpg": _dpg}[benchmark](prompts)
    experiment, state = load_run(config, workdir, reads=PROMPTS)
    folder = local_path(out or workdir / "samples" / f"{benchmark}_{int(state.step):07d}")
    with claimed(folder, f"--mode=sample --export={benchmark}", stop):
        _export(experiment, state, workdir, stop, benchmark, suite, folder)
    if is_main_process():
        suite.check(folder)
    drawn = f"{IMAGES} images of each of {len(suite.texts)} prompts"
    say(f"drew {drawn} with {config.sample.parameters} parameters: {folder}")


def _export(
    experiment: Experiment,
    state: TrainState,
    workdir: epath.Path,
    stop: StopRequest,
    benchmark: str,
    suite: Benchmark,
    folder: pathlib.Path,
) -> None:
    """Draws the images that `folder` lacks."""
    config, texts = experiment.config, experiment.condition
    decoder = load_decoder(experiment, workdir)
    parameters = sampling_parameters(experiment, state)
    record = set_record(config, int(state.step), parameters, decoder) | {"text": texts.encoding()}
    drawn, unfinished = begin_set(folder, benchmark, suite, record)
    problems = [problem for problem in map(texts.problem, suite.texts) if problem]
    if problems:
        say(f"warning: {len(problems)} of {len(suite.texts)} prompts are not fully read; the first: {problems[0]}")

    draw = make_sample_fn(experiment, decoder)
    count = len(suite.texts)
    size = max(1, config.sample.batch_size // IMAGES)  # prompts per group
    groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
    groups = [group for group in groups if not unfinished.isdisjoint(group)]
    for group in tqdm.tqdm(groups, unit="group", mininterval=1, disable=None):
        condition = texts.encode([suite.texts[prompt] for prompt in group])
        condition = jax.tree.map(lambda leaf: np.repeat(leaf, IMAGES, axis=0), condition)
        images = draw_all(draw, config, parameters, condition, stop, first_index=IMAGES * group.start)
        images = np.concatenate(list(images))
        if is_main_process():
            for prompt, four in zip(group, images.reshape(len(group), IMAGES, *images.shape[1:]), strict=True):
                pixels = [to_uint8(image, f"{number} of prompt {prompt}") for number, image in enumerate(four)]
                suite.write(drawn, prompt, np.stack(pixels))


def begin_set(folder: pathlib.Path, benchmark: str, suite: Benchmark, record: dict) -> tuple[DrawnSet, set[int]]:
    """The set of the suite's images, and the prompts that lack a sound image.

    Writes the record of the images beside them, and removes what a killed job left of one. Raises UserError if the
    folder holds images drawn with other settings, or files without a record.
    """
    del record["label_rule"]
    record |= {"samples": IMAGES * len(suite.texts), benchmark: sha256_of_json(suite.texts)}
    drawn = DrawnSet(any_path(folder), any_path(folder.with_name(f"{folder.name}.sampling.json")), record)
    if is_main_process():
        clear_partial(folder.parent, drawn.record_path.name, below=False)
    drawn.check()
    names = [(prompt, name) for prompt, of_prompt in enumerate(suite.names) for name in of_prompt]
    lacking = drawn.lacking([name for _, name in names])
    drawn.begin()
    if is_main_process():
        suite.write_texts(folder)
    return drawn, {prompt for (prompt, _), lacks in zip(names, lacking, strict=True) if lacks}
