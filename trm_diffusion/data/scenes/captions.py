"""Captions of scenes: many wordings of each request, in one closed vocabulary."""

import functools

from trm_diffusion.data.scenes.shapes import COLORS, SHAPES

MAX_CAPTION_WORDS = 20

# The first noun of each shape is used three times in four.
_NOUNS = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "cross": (("cross", "crosses"), ("plus", "pluses")),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "star": (("star", "stars"),),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses")),
    "bar": (("bar", "bars"), ("strip", "strips")),
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENERS = ("", "a picture of ", "an image of ", "a drawing of ")
_COLORED = ("{color} {noun}", "{noun} that is {color}")
_COUNTED = ("{number} {nouns}", "a group of {number} {nouns}", "exactly {number} {nouns}")
_TOGETHER = ("{a} and {b}", "{a} with {b}", "{a} next to {b}", "both {a} and {b}")
# The relation of {a} to {b}; reading the pair the other way round takes the opposite relation.
_RELATED = {
    "left": ("{a} left of {b}", "{a} to the left of {b}", "{a} on the left of {b}", "left of {b} is {a}"),
    "right": ("{a} right of {b}", "{a} to the right of {b}", "{a} on the right of {b}", "right of {b} is {a}"),
    "above": ("{a} above {b}", "{a} over {b}", "{a} higher than {b}", "above {b} is {a}"),
    "below": ("{a} below {b}", "{a} under {b}", "{a} lower than {b}", "below {b} is {a}"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def make_caption(request, draws) -> str:
    """Writes a caption for a request: lower case, no punctuation, at most MAX_CAPTION_WORDS words of `vocabulary()`.

    Args:
      request: a `scenes.source.Request`; the caption does not reveal its canonical order of objects and relation.
      draws: a `scenes.source.Draws`, which chooses template, synonyms and order.
    """
    nouns = [_noun(shape, draws) for shape in request.shapes]
    colors = request.colors or ("",) * len(nouns)
    if request.count > 1:
        words = draws.choice(_COUNTED).format(
            number=_NUMBERS[request.count], nouns=f"{colors[0]} {nouns[0][1]}".strip()
        )
        return _open(words, draws)
    phrases = [_phrase(noun[0], color, draws) for noun, color in zip(nouns, colors, strict=True)]
    if len(phrases) == 1:
        return _open(phrases[0], draws)
    relation = request.relation
    if draws.choice((False, True)):
        phrases.reverse()
        relation = OPPOSITE.get(relation, "")
    template = draws.choice(_RELATED[relation] if relation else _TOGETHER)
    words = template.format(a=phrases[0], b=phrases[1])
    return words if " is {a}" in template else _open(words, draws)


def _noun(shape: str, draws) -> tuple[str, str]:
    """Singular and plural."""
    usual, *others = _NOUNS[shape]
    return draws.choice((usual, usual, usual, *(others or (usual,))))


def _phrase(noun: str, color: str, draws) -> str:
    if not color:
        return f"a {noun}"
    words = draws.choice((_COLORED[0], _COLORED[0], _COLORED[1])).format(color=color, noun=noun)
    return f"{'an' if words[0] == 'o' else 'a'} {words}"  # orange


def _open(words: str, draws) -> str:
    return draws.choice(_OPENERS) + words


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain, sorted; the same for all image sizes."""
    related = [template for templates in _RELATED.values() for template in templates]
    texts = [*_OPENERS, *_COLORED, *_COUNTED, *_TOGETHER, *related, *_NUMBERS.values(), *COLORS]
    texts += [form for shape in SHAPES for noun in _NOUNS[shape] for form in noun]
    words = {word for text in [*texts, "a an"] for word in text.split() if "{" not in word}
    return tuple(sorted(words))
