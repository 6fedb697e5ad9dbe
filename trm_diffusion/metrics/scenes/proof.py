"""Validates the scene judge: on rendered ground truth, shuffled prompts, chance level, and distractors."""

import time

import numpy as np

from trm_diffusion.data.scenes.shapes import BACKGROUND, COLORS, render
from trm_diffusion.data.scenes.source import MARGIN, RADIUS_RANGE, SHAPES_BY_SIZE, TASKS, Scene, SceneSource
from trm_diffusion.metrics.scenes.detect import MIN_FIT, Detection, fit_components, group
from trm_diffusion.metrics.scenes.score import is_lenient, is_strict, strict_chance

NOISE_SIGMAS = (0.0, 0.05, 0.1)  # of white noise added to RGB in [0, 1]
THRESHOLDS = (0.80, 0.85, 0.90, 0.93, 0.95, 0.97, 0.98, 0.99)
PAIRS_PER_SCENE = 9  # scenes of the same task, and as many of any task, that each request is compared with
MIN_STRICT = {32: 0.999, 64: 1.0}
MAX_DISTRACTORS = 0.01  # largest share of distractors that pass as a shape
DISTRACTORS = ("ellipse", "half_disc", "merged_discs")

_SEED = 0


def prove_judge(num_scenes: int = 3000, chance_pairs: int = 5000) -> dict:
    """Runs all checks of the judge; see `metrics/scenes/score.py`.

    Args:
      num_scenes: scenes per image size and noise level, of all compositions, including held-out ones.
      chance_pairs: independent pairs of scene graphs per task.

    Returns:
      A dict for JSON, for each image size:
        truth_strict: {sigma: share of scenes in which exactly the drawn shapes and colours are detected, and which
          are strictly right for their own request}.
        seconds: {sigma: time to judge them}.
        shuffled_pairs, shuffled_disagreements: number of pairs of a request and another scene, half of them of the
          same task, and how often the judgements of the picture and of the scene graph differ on them.
        accepted: {kind: {threshold: share of blobs accepted as an object}}, for truth and each distractor.
        chance: {task: [expected, measured, low, high]}, with a 99.9% interval.
      and `pass`, whether all checks passed.
    """
    report = {"num_scenes": num_scenes, "min_fit": MIN_FIT}
    passed = True
    for size in SHAPES_BY_SIZE:
        source = SceneSource(size, "all", seed=_SEED)
        images = np.stack([source[i]["image"] for i in range(num_scenes)])
        scenes = [source.scene(i)[0] for i in range(num_scenes)]
        truth, seconds = {}, {}
        for sigma in NOISE_SIGMAS:
            start = time.perf_counter()
            fits = fit_components(_noisy(images, sigma))
            detections = group(fits, num_scenes)
            seconds[str(sigma)] = round(time.perf_counter() - start, 2)
            truth[str(sigma)] = float(np.mean([_is_true(*pair) for pair in zip(scenes, detections, strict=True)]))
            if not sigma:
                clean_detections = detections
                accepted = {"truth": _sweep(fits)}
        pairs, disagreements = _shuffled_disagreements(scenes, clean_detections)
        accepted |= {
            kind: _sweep(fit_components(draw_distractors(kind, size, num_scenes // 6))) for kind in DISTRACTORS
        }
        chance = measure_chance(source, chance_pairs)
        passed &= min(truth.values()) >= MIN_STRICT[size] and not disagreements
        passed &= all(accepted[kind][str(MIN_FIT)] <= MAX_DISTRACTORS for kind in DISTRACTORS)
        passed &= all(low <= expected <= high for expected, _, low, high in chance.values())
        report[f"{size}x{size}"] = {
            "truth_strict": truth,
            "seconds": seconds,
            "shuffled_pairs": pairs,
            "shuffled_disagreements": disagreements,
            "accepted": accepted,
            "chance": chance,
        }
    return report | {"pass": bool(passed)}


def _is_true(scene: Scene, detection: Detection) -> bool:
    drawn, found = (sorted((item.shape, item.color) for item in some.objects) for some in (scene, detection))
    return found == drawn and is_strict(scene.request, detection)


def _noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(_SEED).standard_normal(images.shape, np.float32)
    return images + 2 * sigma * noise  # [-1, 1] is twice as wide as [0, 1]


def _sweep(fits: list) -> dict[str, float]:
    return {str(threshold): float(np.mean([fit.is_object(threshold) for fit in fits])) for threshold in THRESHOLDS}


def _shuffled_disagreements(scenes: list, detections: list[Detection]) -> tuple[int, int]:
    """Counts pairs of a request and another scene, and disagreements on them: strict and lenient count separately."""
    graphs = [Detection(scene.objects) for scene in scenes]
    count = disagreements = 0
    # Tasks repeat in a cycle: multiples of its length keep the task, most other offsets change it.
    cycle = len(TASKS)
    for offset in [step * i for step in (cycle, cycle + 1) for i in range(1, PAIRS_PER_SCENE + 1)]:
        for number, scene in enumerate(scenes):
            other = (number + offset) % len(scenes)
            for is_right in (is_strict, is_lenient):
                disagreements += is_right(scene.request, graphs[other]) != is_right(scene.request, detections[other])
            count += 1
    return count, disagreements


def measure_chance(source: SceneSource, num_pairs: int) -> dict[str, list[float]]:
    """{task: [expected, measured, low, high]}: strict score of scene graphs for independent requests of their task.

    The interval is the 99.9% Clopper-Pearson interval.
    """
    from scipy.stats import binomtest

    chance = {}
    for offset, task in enumerate(source.tasks):
        scenes = [source.scene(offset + len(source.tasks) * i)[0] for i in range(2 * num_pairs)]
        pairs = zip(scenes[::2], scenes[1::2], strict=True)
        right = sum(is_strict(a.request, Detection(b.objects)) for a, b in pairs)
        interval = binomtest(right, num_pairs).proportion_ci(confidence_level=0.999)
        expected = strict_chance(task, len(source.shapes))
        chance[task] = [expected, right / num_pairs, float(interval.low), float(interval.high)]
    return chance


def draw_distractors(kind: str, size: int, number: int) -> np.ndarray:
    """Images [number, size, size, 3] in [-1, 1], each of one object that is none of the shapes.

    ellipse: of aspect 1.25 to 1.8; half_disc: cut through the centre; merged_discs: two discs of one colour, whose
    centres are 0.8 to 1.2 radii apart. All are randomly rotated, in colours of the palette.
    """
    rng = np.random.default_rng(_SEED)
    centres = np.arange(size) + 0.5
    colors = np.array(list(COLORS.values()))
    images = np.tile(render((), size), (number, 1, 1, 1))
    for image in images:
        radius = rng.uniform(*RADIUS_RANGE) * size / 32
        middle = rng.uniform(radius + MARGIN, size - radius - MARGIN, 2)
        angle = rng.uniform(0, 2 * np.pi)
        x, y = np.meshgrid(centres - middle[0], centres - middle[1])
        x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        if kind == "ellipse":
            aspect = rng.uniform(1.25, 1.8)
            distance = (np.hypot(x, y * aspect) - radius) / np.sqrt(aspect)
        elif kind == "half_disc":
            distance = np.maximum(np.hypot(x, y) - radius, -y)
        elif kind == "merged_discs":
            apart = rng.uniform(0.8, 1.2) * radius / 2
            distance = np.minimum(np.hypot(x - apart, y), np.hypot(x + apart, y)) - 0.7 * radius
        else:
            raise ValueError(f"distractor {kind!r} is none of {DISTRACTORS}")
        mask = np.clip(0.5 - distance, 0, 1)[..., None]
        image += 2 * mask * (colors[rng.integers(len(colors))] - BACKGROUND)
    return images
