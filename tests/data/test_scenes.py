"""Scenes: pure functions of their index, true captions, gaps between objects, nothing held out in training."""

import collections
import itertools
import pickle

import chex
import numpy as np
import pytest

from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.scenes.captions import MAX_CAPTION_WORDS, OPPOSITE, vocabulary
from trm_diffusion.data.scenes.shapes import COLORS, SHAPES, coverage
from trm_diffusion.data.scenes.source import COUNTS, GAP, MARGIN, RELATIONS, SPLITS, TASKS, Request, SceneSource
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError

CONFIG = DataConfig(source="scenes", image_size=32, channels=3, num_classes=0)


def test_records_are_pure_functions_of_seed_split_and_index():
    source = make_source(CONFIG)
    element = source[7]
    assert set(element) == {"image", "caption", "index"} and element["index"] == 7
    chex.assert_shape(element["image"], (32, 32, 3))
    assert element["image"].dtype == np.float32 and abs(element["image"]).max() <= 1
    assert element["caption"].dtype.kind == "U" and element["caption"].shape == ()
    again = pickle.loads(pickle.dumps(source))
    for index in (0, 7, 2**20 - 1):
        chex.assert_trees_all_equal(again[index], source[index])
    sources = [SceneSource(32, split) for split in SPLITS] + [SceneSource(32, seed=1)]
    images = [source[i]["image"].tobytes() for source in sources for i in range(50)]
    assert len(set(images)) == len(images)


def test_batches_hold_the_captions_of_their_images_with_and_without_workers():
    source = make_source(CONFIG)
    batches = []
    for workers in (0, 1):
        iterator = make_iterator(source, DataConfig(workers=workers), seed=3, batch_size=16)
        batches.append(next(iterator))
        iterator.close()
    chex.assert_trees_all_equal(*batches)
    for caption, index in zip(batches[0]["caption"], batches[0]["index"], strict=True):
        assert caption == source[int(index)]["caption"]


@pytest.mark.parametrize(("size", "number"), [(32, 100_000), (64, 20_000)])
def test_no_training_scene_contains_a_held_out_composition(size, number):
    source = SceneSource(size)
    kinds = collections.Counter(composition[0] for composition in source.held_out)
    assert set(kinds) == {"color", "pair", "count", *RELATIONS}
    seen = set()
    for index in range(number):
        scene, _ = source.scene(index)
        compositions = scene.compositions()
        assert scene.request.compositions() <= compositions
        seen |= compositions
    assert not seen & source.held_out
    # Nothing else is missing: everything that can be drawn and is not held out has been drawn.
    possible = {("color", *pair) for pair in itertools.product(source.shapes, COLORS)}
    possible |= {("count", *pair) for pair in itertools.product(source.shapes, COUNTS)}
    for a, b in itertools.permutations(source.shapes, 2):
        possible |= {("pair", *sorted((a, b)))} | {(relation, a, b) for relation in RELATIONS}
    held_pairs = {composition[1:] for composition in source.held_out if composition[0] == "pair"}
    unseen = {c for c in possible - seen if not (c[0] in RELATIONS and tuple(sorted(c[1:])) in held_pairs)}
    assert unseen == source.held_out


def test_evaluation_splits_are_balanced_and_on_their_side():
    for size in (32, 64):
        for split in ("seen", "held_out"):
            source = SceneSource(size, split)
            requests = [source.scene(i)[0].request for i in range(1500)]
            counts = collections.Counter(request.task for request in requests)
            assert set(counts.values()) == {1500 // len(source.tasks)}
            assert set(counts) == set(TASKS if split == "seen" else TASKS[1:])
            held = set().union(*(request.compositions() & source.held_out for request in requests))
            assert held == (source.held_out if split == "held_out" else set())
            assert all(bool(r.compositions() & source.held_out) == (split == "held_out") for r in requests)
            # GenEval's captions name colours in two tasks only.
            assert {r.task for r in requests if r.colors} == {"colors", "color_attr"}


@pytest.mark.parametrize("size", [32, 64])
def test_objects_lie_apart_and_inside(size):
    source = SceneSource(size, "all")
    scale = size / 32
    for index in range(1200):
        objects = source.scene(index)[0].objects
        for item in objects:
            edge = item.radius + MARGIN * scale - 1e-9
            assert all(edge <= place <= size - edge for place in (item.x, item.y))
        for a, b in itertools.combinations(objects, 2):
            distance = max(abs(a.x - b.x), abs(a.y - b.y))
            assert distance >= a.radius + b.radius + GAP * scale - 1e-9


def test_captions_say_the_request_in_the_closed_vocabulary():
    words, synonyms = collections.Counter(), _synonyms()
    for split in SPLITS:
        source = SceneSource(64, split)
        for index in range(3000):
            scene, caption = source.scene(index)
            words.update(caption.split())
            assert len(caption.split()) <= MAX_CAPTION_WORDS
            assert _parse(caption, scene.request.task, synonyms) == scene.request, caption
    assert sorted(words) == list(vocabulary())


def _synonyms() -> dict[str, str]:
    groups = "circle disc, square box, triangle, cross plus, ring hoop, star, diamond rhombus, bar strip"
    singular = {noun: group.split()[0] for group in groups.split(", ") for noun in group.split()}
    return singular | {noun + suffix: shape for noun, shape in singular.items() for suffix in ("s", "es")}


def _parse(caption: str, task: str, synonyms: dict[str, str]) -> Request:
    """Reads a caption using only the positions of its nouns, colours and relation words."""
    words = caption.split()
    nouns = [i for i, word in enumerate(words) if word in synonyms]
    shapes = [synonyms[words[i]] for i in nouns]
    # A colour stands directly before its noun, or after it as in "box that is red".
    colors = []
    for i in nouns:
        after = words[i + 3] if words[i + 1 : i + 3] == ["that", "is"] else ""
        colors += [next((word for word in (words[i - 1], after) if word in COLORS), None)]
    assert len({color is None for color in colors}) == 1
    count = next((n for word, n in {"two": 2, "three": 3, "four": 4}.items() if word in words), 1)
    meanings = {"left": "left", "right": "right", "above": "above", "over": "above", "higher": "above"}
    meanings |= {"below": "below", "under": "below", "lower": "below"}
    relation = next((meanings[word] for word in words if word in meanings), "")
    if relation and words[0] in meanings:  # "left of b is a"
        shapes, colors = shapes[::-1], colors[::-1]
    pairs = list(zip(shapes, colors, strict=True))
    if relation not in ("", *RELATIONS):
        pairs, relation = pairs[::-1], OPPOSITE[relation]
    if not relation:
        pairs.sort(key=lambda pair: SHAPES.index(pair[0]))
    colors = tuple(color for _, color in pairs if color)
    return Request(task, tuple(shape for shape, _ in pairs), count, colors, relation)


def test_shapes_have_their_areas():
    """Sums of coverage against plane geometry, in units of r^2."""
    tenth = np.pi / 5
    areas = {
        "circle": np.pi,
        "square": 1.8**2,
        "triangle": 2.0,
        "cross": 2 * 2 * 0.72 - 0.72**2,
        "ring": np.pi * (1 - 0.44**2),
        "star": 5 * 0.45 * np.sin(tenth),
        "diamond": 1.5,
        "bar": 2 * 0.72,
    }
    assert tuple(areas) == SHAPES
    pixels = np.arange(-20, 21)
    for shape, area in areas.items():
        for radius in (6.0, 11.3):
            total = coverage(shape, pixels[None, :] + 0.3, pixels[:, None] - 0.2, radius).sum()
            np.testing.assert_allclose(total, area * radius**2, rtol=0.02, err_msg=shape)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 48}, "32 or 64"),
        ({"split": "test"}, "train, seen, held_out, all"),
        ({"num_classes": 10}, "config.data.num_classes=0"),
        ({"channels": 1}, "config.data.channels=3"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(changes, says):
    values = {"source": "scenes", "image_size": 32, "channels": 3, "num_classes": 0} | changes
    with pytest.raises(UserError) as caught:
        make_source(DataConfig(**values))
    assert says in str(caught.value) and "\n" not in str(caught.value)
