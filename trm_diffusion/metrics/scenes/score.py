"""Text following on scenes, scored exactly: GenEval's six tasks, strict and lenient.

`python -m trm_diffusion.metrics.scenes --selfcheck` validates the judge (`metrics/scenes/proof.py`).
"""

import itertools
from collections.abc import Sequence

import numpy as np

from trm_diffusion.data.scenes.shapes import COLORS
from trm_diffusion.data.scenes.source import COUNTS, TASKS, Request, SceneSource, holds
from trm_diffusion.metrics.scenes.detect import MAX_COLOR_DISTANCE, MIN_FIT, THRESHOLD, Detection, fit_components, group

FIT_SWEEP = (0.90, 0.93, 0.95, 0.97, 0.98)  # thresholds of the judge at which the strict score is also reported

_RESAMPLES = 2000  # bootstrap


def is_lenient(request: Request, detection: Detection) -> bool:
    """GenEval's semantics: the requested objects are present; other objects matter only for counts.

    A count is right if exactly that many objects of the shape are present. In the other tasks one object of a
    shape is enough, and any one of several may have the requested colour or position.
    """
    if request.count > 1:
        found = [item for item in detection.objects if item.shape == request.shapes[0]]
        return len(found) == request.count and all(item.color in (request.colors or COLORS) for item in found)
    colors = request.colors or ("",) * len(request.shapes)
    candidates = [
        [item for item in detection.objects if item.shape == shape and color in ("", item.color)]
        for shape, color in zip(request.shapes, colors, strict=True)
    ]
    if request.relation:
        return any(holds(request.relation, a, b) for a, b in itertools.product(*candidates))
    return all(candidates)


def is_strict(request: Request, detection: Detection) -> bool:
    """Lenient, and exactly the requested objects: no others, and nothing unrecognised."""
    asked = sorted(request.shapes * request.count)
    exact = not detection.unrecognised and sorted(item.shape for item in detection.objects) == asked
    return exact and is_lenient(request, detection)


def strict_chance(task: str, num_shapes: int) -> float:
    """Probability that a perfect image of a random request is strictly right for another one of the same task."""
    colors = len(COLORS)
    pairs = num_shapes * (num_shapes - 1) // 2
    outcomes = {
        "single_object": num_shapes,
        "two_object": pairs,
        "counting": len(COUNTS) * num_shapes,
        "colors": num_shapes * colors,
        "position": 4 * pairs,
        "color_attr": pairs * colors * (colors - 1),
    }
    return 1 / outcomes[task]


def evaluate_scenes(images: np.ndarray, source: SceneSource, *, seed: int = 0) -> dict:
    """Scores one generated image for each of the source's first N captions.

    Args:
      images: [N, S, S, 3] in [-1, 1]; image i was generated from the caption of `source[i]`.
      source: the prompts, of split `seen` or `held_out`.
      seed: of the bootstrap and of the shuffle.

    Returns:
      A dict for JSON:
        num_images, split, image_size, judge: what was judged, and the judge's constants.
        strict, lenient: {task: score, "overall": unweighted mean over the tasks}; and "overall_without_single",
          to compare with held-out scores, since single objects cannot be held out.
        strict_95, lenient_95: the same keys, [low, high]: 95% percentile bootstrap over the images of each
          task. Its width is 0 if all images of a task are right, or wrong.
        strict_overall_by_min_fit: the strict overall score at other thresholds of the judge.
        chance_strict: the same keys, for perfect images of other requests when all are equally likely.
        shuffled_strict: the same keys, measured: each image against another image's request of the same task.
          Held-out requests are few, so it is far above chance there.
        unrecognised_blob_rate: share of unrecognised blobs among all blobs.
        unrecognised_image_rate: share of images with at least one.
        empty_image_rate: {task: share of images in which nothing stands out from the background}.

    Raises:
      UserError: images of a wrong size, or not finite.
      ValueError: fewer than two images per task.
    """
    if len(images) < 2 * len(source.tasks):
        raise ValueError(f"{len(images)} images are too few for {len(source.tasks)} tasks")
    requests = [source.scene(i)[0].request for i in range(len(images))]
    fits = fit_components(images)
    detections = group(fits, len(images))
    task_n = np.array([request.task for request in requests])
    rng = np.random.default_rng(seed)
    blobs = sum(len(found.objects) + found.unrecognised for found in detections)
    empty = np.array([not found.objects and not found.unrecognised for found in detections])
    result = {
        "num_images": len(images),
        "split": source.split,
        "image_size": source.image_size,
        "judge": {"min_fit": MIN_FIT, "max_color_distance": MAX_COLOR_DISTANCE, "threshold": THRESHOLD},
    }
    for name, is_right in (("strict", is_strict), ("lenient", is_lenient)):
        right = _right_by_task(is_right, requests, detections, source.tasks)
        result[name] = _by_task({task: float(r.mean()) for task, r in right.items()})
        result[f"{name}_95"] = _intervals(right, rng)
    overall_by_fit = {}
    for min_fit in FIT_SWEEP:
        right = _right_by_task(is_strict, requests, group(fits, len(images), min_fit), source.tasks)
        overall_by_fit[str(min_fit)] = float(np.mean([r.mean() for r in right.values()]))
    shuffled = {task: _shuffled(np.flatnonzero(task_n == task), requests, detections, rng) for task in source.tasks}
    return result | {
        "strict_overall_by_min_fit": overall_by_fit,
        "chance_strict": _by_task({task: strict_chance(task, len(source.shapes)) for task in source.tasks}),
        "shuffled_strict": _by_task(shuffled),
        "unrecognised_blob_rate": sum(found.unrecognised for found in detections) / max(1, blobs),
        "unrecognised_image_rate": float(np.mean([found.unrecognised > 0 for found in detections])),
        "empty_image_rate": {task: float(empty[task_n == task].mean()) for task in source.tasks},
    }


def _right_by_task(is_right, requests, detections, tasks) -> dict[str, np.ndarray]:
    """{task: bool [images of the task]}."""
    right = {task: [] for task in tasks}
    for request, detection in zip(requests, detections, strict=True):
        right[request.task].append(is_right(request, detection))
    return {task: np.array(values) for task, values in right.items()}


def _by_task(scores: dict) -> dict:
    """Adds the overall figures to scores, which have one number or array of resamples per task."""
    several = [score for task, score in scores.items() if task != TASKS[0]]
    return scores | {
        "overall": sum(scores.values()) / len(scores),
        "overall_without_single": sum(several) / len(several),
    }


def _intervals(right: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, list[float]]:
    """Percentile bootstrap; n zeros and ones drawn with replacement have a binomial sum."""
    resampled = {task: rng.binomial(len(r), r.mean(), _RESAMPLES) / len(r) for task, r in right.items()}
    return {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in _by_task(resampled).items()}


def _shuffled(
    members: np.ndarray, requests: Sequence[Request], detections: Sequence[Detection], rng: np.random.Generator
) -> float:
    """Strict score when each of `members` is judged by the request of the next one in a random cycle."""
    cycle = rng.permutation(members)
    return float(
        np.mean([is_strict(requests[i], detections[j]) for i, j in zip(cycle, np.roll(cycle, 1), strict=True)])
    )
