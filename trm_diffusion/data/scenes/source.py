"""Compositional scenes with captions, in GenEval's six tasks, with exactly known ground truth.

A *request* is what a caption asks for; a *scene* is what is drawn for it, with everything that the caption leaves
open drawn at random. Both are reduced to *compositions* in one canonical form ("a circle right of a square" is "a
square left of a circle"). Some compositions are held out: no training scene contains one, whether its caption mentions
it or not.

Record i is a pure function of (seed, split, i); there is nothing to store and nothing to download.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_captioned_element
from trm_diffusion.data.scenes.captions import MAX_CAPTION_WORDS, make_caption, vocabulary
from trm_diffusion.data.scenes.shapes import COLORS, SHAPES, render
from trm_diffusion.errors import UserError

__all__ = ["MAX_CAPTION_WORDS", "TASKS", "Object", "Request", "Scene", "SceneSource", "held_out", "vocabulary"]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's tags
COUNTS = (2, 3, 4)
RELATIONS = ("left", "above")  # canonical; "right" and "below" are these with the objects swapped
SHAPES_BY_SIZE = {32: SHAPES[:4], 64: SHAPES}
SPLITS = ("train", "seen", "held_out", "all")  # a stream's key ends in the index of its split: append only

# In pixels of a 32x32 image; twice that at 64x64. At 32x32 centres are multiples of four pixels, so that a small model
# with 4x4 patches sees each object in few forms; at 64x64 they lie on any pixel.
RADIUS_RANGE = (5.0, 6.5)  # over all sizes
RADII_BY_SIZE = {32: (5.0, 6.0), 64: (5.0, 5.25, 5.5, 5.75, 6.0, 6.25, 6.5)}
LATTICE_BY_SIZE = {32: 4.0, 64: 0.5}  # spacing of the possible centres
GAP = 3.0  # least space between the bounding squares of two objects
MARGIN = 1.0  # least space between a bounding square and the edge of the image
MAX_SLANT = 0.3  # in a position scene, largest ratio of off-axis to on-axis offset
# A relation holds when its component of the unit vector between two centres is above this, as in GenEval.
RELATION_THRESHOLD = 0.5
_EXTRA_COLOR_CHANCE = 0.3  # probability that a training caption names colours which its task does not need

Composition = tuple  # ("color", shape, color), ("pair", a, b), ("count", shape, n), (relation, a, b)


@dataclasses.dataclass(frozen=True)
class Object:
    """One drawn or detected object: centre (x, y) in pixels from the top left corner, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Request:
    """What a caption asks for.

    Attributes:
      task: one of TASKS.
      shapes: one shape, or two different ones, in the order of the relation if there is one, else of SHAPES.
      count: number of objects of the first shape, if there is no second.
      colors: colours of the shapes, in the same order; () means any.
      relation: "", or the one of RELATIONS that the first shape has to the second.
    """

    task: str
    shapes: tuple[str, ...]
    count: int = 1
    colors: tuple[str, ...] = ()
    relation: str = ""

    def compositions(self) -> set[Composition]:
        """What this request fixes: a subset of the compositions of every scene that satisfies it."""
        found = {("color", shape, color) for shape, color in zip(self.shapes, self.colors, strict=bool(self.colors))}
        if self.count > 1:
            found.add(("count", self.shapes[0], self.count))
        if len(self.shapes) == 2:
            found.add(("pair", *sorted(self.shapes)))
        if self.relation:
            found.add((self.relation, *self.shapes))
        return found


@dataclasses.dataclass(frozen=True)
class Scene:
    request: Request
    objects: tuple[Object, ...]

    def compositions(self) -> set[Composition]:
        """Every composition in the scene, requested or not."""
        shapes = [item.shape for item in self.objects]
        found = {("color", item.shape, item.color) for item in self.objects}
        found |= {("count", shape, shapes.count(shape)) for shape in set(shapes) if shapes.count(shape) > 1}
        for a in self.objects:
            for b in self.objects:
                if a.shape != b.shape:
                    found.add(("pair", *sorted((a.shape, b.shape))))
                    found |= {(relation, a.shape, b.shape) for relation in RELATIONS if holds(relation, a, b)}
        return found


def holds(relation: str, a: Object, b: Object) -> bool:
    """Whether `a` is left of or above `b`; both can hold at once between diagonal neighbours."""
    x, y = b.x - a.x, b.y - a.y
    return (x if relation == "left" else y) > RELATION_THRESHOLD * math.hypot(x, y)


def held_out(shapes: Sequence[str]) -> frozenset[Composition]:
    """The compositions that training never sees: between 1/14 and 1/6 of each kind. Every shape, colour, count and
    relation occurs in other compositions, which training does see."""
    number = len(shapes)
    colors = tuple(COLORS)
    colored = number * len(colors) // 8
    pairs = number * (number - 1) // 12
    found = {
        ("color", shapes[i % number], colors[(i * len(colors) // colored + 1) % len(colors)]) for i in range(colored)
    }
    found |= {("pair", *sorted((shapes[i], shapes[i + number // 2]))) for i in range(pairs)}
    found |= {("count", shapes[i], COUNTS[i % len(COUNTS)]) for i in range(1, number, 2)}
    found |= {(RELATIONS[(i + 1) % 2], shapes[(i + 1) % number], shapes[i]) for i in range(number)}
    return frozenset(found)


class Draws:
    """Random choices from raw Philox words, which are the same in every version of NumPy."""

    def __init__(self, seed: int, stream: int, index: int):
        key = np.array([seed, stream], np.uint64)
        self._philox = np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (self._philox.random_raw() >> 11) * 2.0**-53

    def choice(self, options: Sequence):
        return options[int(self.uniform(0, len(options)))]

    def two(self, options: Sequence) -> tuple:
        """Two different options, in random order."""
        first = int(self.uniform(0, len(options)))
        second = int(self.uniform(0, len(options) - 1))
        return options[first], options[second + (second >= first)]


class SceneSource(Source):
    """An endless supply of captioned scenes, cut into epochs. Every task occurs equally often.

    Splits:
      train: scenes without any held-out composition. Captions may name colours that the task does not need.
      seen: the same, but other scenes than in `train`, and captions that say no more than GenEval's task does.
      held_out: every request contains a held-out composition; all tasks except single_object, which has none.
      all: all compositions, held out or not.
    """

    captioned = True
    vocabulary = vocabulary()
    in_memory = True
    held_out_split = "held_out"

    def __init__(self, image_size: int, split: str = "train", *, seed: int = 0, num_scenes: int = 2**20):
        if image_size not in SHAPES_BY_SIZE:
            raise UserError(f"config.data.image_size={image_size}: scenes are drawn at 32 or 64 pixels a side")
        if split not in SPLITS:
            raise UserError(f"config.data.split={split!r}: scenes have the splits {', '.join(SPLITS)}")
        self.image_size, self.split, self.seed = image_size, split, seed
        self.sample_shape = (image_size, image_size, 3)
        self.shapes = SHAPES_BY_SIZE[image_size]
        self.held_out = held_out(self.shapes)
        self.tasks = TASKS[1:] if split == "held_out" else TASKS
        self._num_scenes = num_scenes

    @classmethod
    def from_config(cls, config: DataConfig) -> "SceneSource":
        return cls(config.image_size, config.split)

    def __len__(self) -> int:
        return self._num_scenes

    def __getitem__(self, index: int) -> Element:
        scene, caption = self.scene(index)
        return make_captioned_element(render(scene.objects, self.image_size), caption, index)

    def scene(self, index: int) -> tuple[Scene, str]:
        """Scene `index` and its caption, not rendered; the task is tasks[index % len(tasks)]."""
        draws = Draws(self.seed, SPLITS.index(self.split), index)
        task = self.tasks[index % len(self.tasks)]
        while True:  # a few tries: about one scene in four is rejected
            request = self._draw_request(task, draws)
            asks_held_out = bool(request.compositions() & self.held_out)
            if self.split != "all" and asks_held_out != (self.split == "held_out"):
                continue
            scene = Scene(request, tuple(self._draw_objects(request, draws)))
            if self.split in ("all", "held_out") or not scene.compositions() & self.held_out:
                return scene, make_caption(request, draws)

    def _draw_request(self, task: str, draws: Draws) -> Request:
        shapes = (draws.choice(self.shapes),)
        count, colors, relation = 1, (), ""
        if task in ("two_object", "position", "color_attr"):
            shapes = draws.two(self.shapes)
        if task == "position":
            relation = draws.choice(RELATIONS)
        else:
            shapes = tuple(sorted(shapes, key=SHAPES.index))
        if task == "counting":
            count = draws.choice(COUNTS)
        if task == "colors" or (
            task in ("counting", "position") and self.split == "train" and draws.uniform(0, 1) < _EXTRA_COLOR_CHANCE
        ):
            colors = tuple(draws.choice(tuple(COLORS)) for _ in shapes)
        elif task == "color_attr":
            colors = draws.two(tuple(COLORS))
        return Request(task, shapes, count, colors, relation)

    def _draw_objects(self, request: Request, draws: Draws) -> list[Object]:
        """Objects for the request. What it leaves open is random; counted objects share a colour."""
        names = request.shapes * request.count
        colors = request.colors or tuple(draws.choice(tuple(COLORS)) for _ in request.shapes)
        scale, spacing = self.image_size / 32, LATTICE_BY_SIZE[self.image_size]
        radii = [draws.choice(RADII_BY_SIZE[self.image_size]) for _ in names]
        if len(names) == 1:
            places = [tuple(draws.choice(_places(radii[0], spacing)) for _ in "xy")]
        elif len(names) == 2:
            places = _place_two(radii, request.relation, spacing, draws)
        else:
            places = _place_in_quarters(radii, spacing, draws)
        return [
            Object(shape, color, scale * x, scale * y, scale * radius)
            for shape, color, (x, y), radius in zip(names, colors * request.count, places, radii, strict=True)
        ]


@functools.cache
def _places(radius: float, spacing: float, high: float = 32.0 - MARGIN) -> tuple[float, ...]:
    """Possible coordinates of a centre, between the margin and `high`."""
    first, last = math.ceil((MARGIN + radius) / spacing), math.floor((high - radius) / spacing)
    return tuple(spacing * i for i in range(first, last + 1))


@functools.cache
def _pairs(radii: tuple[float, float], spacing: float, least: float, most: float) -> tuple[tuple[float, float], ...]:
    """Coordinates of two centres on one axis, with the second `least` to `most` beyond the first."""
    both = itertools.product(*(_places(radius, spacing) for radius in radii))
    return tuple((first, second) for first, second in both if least <= second - first <= most)


def _place_two(radii: list[float], relation: str, spacing: float, draws: Draws) -> list[tuple[float, float]]:
    """Two centres, apart on one axis. A relation sets that axis and the order; the other axis is nearly level."""
    forward = bool(relation) or draws.choice((False, True))
    ordered = tuple(radii if forward else radii[::-1])
    along = draws.choice(_pairs(ordered, spacing, sum(radii) + GAP, 32.0))
    along = along if forward else along[::-1]
    most = abs(along[1] - along[0]) * (MAX_SLANT if relation else 1)
    across = draws.choice(_pairs(tuple(radii), spacing, -most, most))
    vertical = relation == "above" or (not relation and draws.choice((False, True)))
    return list(zip(across, along, strict=True) if vertical else zip(along, across, strict=True))


def _place_in_quarters(radii: list[float], spacing: float, draws: Draws) -> list[tuple[float, float]]:
    """Up to four centres, each in a different quarter of the image."""
    quarters = [(0, 0), (0, 16), (16, 0), (16, 16)]
    places = []
    for radius in radii:
        corner = draws.choice(quarters)
        quarters.remove(corner)
        x, y = (draws.choice(_places(radius, spacing, 16 - GAP / 2)) for _ in "xy")
        places.append((32 - x if corner[0] else x, 32 - y if corner[1] else y))
    return places
