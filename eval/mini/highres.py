"""High-resolution scenes: too fine for one view of a small tower, fine enough for its tiles.

The world is that of :mod:`eval.mini.scenes`, on an image of up to 24x24 patches. A tower of 168 px sees
a quarter of it at a time: 2x2, 1x2 or 2x1 tiles show every patch as it was drawn, the overview shows the whole at half
the size. Signs with words are what only tiles can show well, and objects stand directly right of the signs, so that
a question can name a sign by the object next to it.

Everything about a scene follows from its seed, and the seed says which split it belongs to (``scenes.split_of``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from eval.mini import questions, scenes
from eval.mini.questions import Question, describe, mention, phrase
from eval.mini.scenes import FULL_GRID, PATCH, Entity, Scene

#: Patches a side of one tile, and pixels.
TILE_GRID = FULL_GRID // 2
TILE = PATCH * TILE_GRID
#: Canvases to choose from, (width, height) in pixels, as `image_grid_pinpoints` names them.
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
#: Rows and columns of patches that scenes may have. Neither canvas nor tiles change their scale, most leave a border.
SIZES = {
    "2x2": ((24, 24), (24, 24), (24, 22), (24, 20), (24, 18), (22, 24), (20, 24), (18, 24)),
    "1x2": ((12, 24), (12, 24), (12, 22), (12, 20), (10, 24)),
    "2x1": ((24, 12), (24, 12), (22, 12), (20, 12), (24, 10)),
}
LAYOUTS = tuple(SIZES)
#: Patches a side of an object.
SIDES = {"small": 3, "large": 5}
#: Share of the signs that get an object on their right, where there is room.
BESIDE = 0.9


@dataclass(frozen=True)
class HighResScene(Scene):
    """A scene that fills the first ``rows`` and ``cols`` of the full grid."""

    rows: int
    cols: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return PATCH * self.cols, PATCH * self.rows


def generate(seed: int, layout: str | None = None) -> HighResScene:
    """The scene of a seed; ``layout`` (one of ``LAYOUTS``) is half the time 2x2 unless it is given.

    Raises
    ------
    ValueError
        If there is no such layout.
    """
    if layout is not None and layout not in SIZES:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    rng = np.random.default_rng((seed, FULL_GRID, 7))
    drawn = str(rng.choice(LAYOUTS, p=(0.5, 0.25, 0.25)))
    sizes = SIZES[layout or drawn]
    rows, cols = sizes[rng.integers(len(sizes))]
    taken = np.ones((FULL_GRID, FULL_GRID), bool)
    taken[:rows, :cols] = False
    return HighResScene(seed, FULL_GRID, 0, 0, tuple(_entities(rng, taken)), rows, cols)


def _entities(rng: np.random.Generator, taken: np.ndarray) -> list[Entity]:
    """Signs, most with an object on their right, other objects and scribbles, as many as the free area is large."""
    share = 1 - taken.mean()
    n_objects, n_signs, n_scribbles = (round(share * rng.uniform(*span)) for span in ((7, 12), (3, 5), (1, 3.5)))
    shapes, colors = (rng.choice(names, 5, replace=False) for names in (scenes.SHAPES, scenes.COLOR_NAMES))
    entities: list[Entity] = []

    def new_object() -> dict[str, str]:
        looks = {name: str(rng.choice(values)) for name, values in (("shape", shapes), ("color", colors))}
        size = str(rng.choice(scenes.SIZES, p=(0.65, 0.35)))
        return {**looks, "size": size, "pattern": str(rng.choice(scenes.PATTERNS))}

    for color in rng.permutation(scenes.COLOR_NAMES)[: max(2, n_signs)]:
        word = "".join(rng.choice(scenes.ALPHABET, int(rng.integers(2, scenes.MAX_WORD + 1))))
        sign, width = {"color": str(color), "word": word}, 2 * len(word) + 1
        looks = new_object()
        side = SIDES[looks["size"]]
        spot = scenes.free_place(rng, taken, side, width + side) if rng.random() < BESIDE else None
        if spot:
            row, col = spot
            scenes.put(entities, taken, rng, "sign", row + side // 2 - 1, col, 3, width, **sign)
            scenes.put(entities, taken, rng, "object", row, col + width, side, side, **looks)
        else:
            scenes.place(entities, taken, rng, "sign", 3, width, **sign)
    for _ in range(max(3, n_objects) - sum(item.kind == "object" for item in entities)):
        looks = new_object()
        scenes.place(entities, taken, rng, "object", SIDES[looks["size"]], SIDES[looks["size"]], **looks)
    for _ in range(n_scribbles):
        scenes.place(entities, taken, rng, "scribble", 3, 3, str(rng.choice(scenes.COLOR_NAMES)))
    return entities


def draw(scene: HighResScene) -> Image.Image:
    """The scene's image, RGB, ``scene.size`` pixels."""
    return scenes.render(scene).crop((0, 0, *scene.size))


def gaps(first: Entity, second: Entity) -> tuple[int, int]:
    """Free patches between two boxes, along rows and columns; negative by as much as they overlap."""
    row0, col0, row1, col1 = first.box
    top, left, bottom, right = second.box
    return max(top - row1, row0 - bottom), max(left - col1, col0 - right)


def pairs(scene: Scene) -> list[tuple[Entity, Entity]]:
    """Signs and the objects that touch their right edge, where neither has a second one of the other kind close by."""
    close = [(sign, item) for sign in scene.signs for item in scene.objects if max(gaps(sign, item)) < 2]
    return [
        (sign, item)
        for sign, item in close
        if sum(other is sign for other, _ in close) == sum(other is item for _, other in close) == 1
        if item.box[1] == sign.box[3] and abs(item.row - sign.row) <= 1
    ]


def _hop(scene: Scene, text: str, named: str, start: Entity, end: Entity, answer: str, kind: str) -> Question:
    """A question that names one thing and asks for the one beside it; the text's last word means the latter."""
    tail = text[text.index(named) :]
    return Question(text, answer, kind, (mention(scene, named, [start]), mention(scene, tail, [end])))


def ask_by_object(rng: np.random.Generator, scene: Scene) -> Question | None:
    """The word, or the colour, of the sign beside an object."""
    found = pairs(scene)
    if not found:
        return None
    sign, target = found[rng.integers(len(found))]
    described = describe(rng, scene.objects, target)
    if described is None:
        return None
    name = phrase(described)
    if rng.random() < 0.6:
        return _hop(scene, f"What does the sign by the {name} say?", name, target, sign, sign.word, "sign by object")
    text = f"What color is the sign by the {name}?"
    return _hop(scene, text, name, target, sign, sign.color, "color by object")


def ask_by_sign(rng: np.random.Generator, scene: Scene) -> Question | None:
    """An attribute of the object beside a sign."""
    found = pairs(scene)
    if not found:
        return None
    sign, target = found[rng.integers(len(found))]
    hidden, name = str(rng.choice(("pattern", "color", "shape"), p=(0.2, 0.4, 0.4))), f"{sign.color} sign"
    text = f"What {hidden} is the object by the {name}?"
    return _hop(scene, text, name, sign, target, getattr(target, hidden), "object by sign")


def ask_attribute(rng: np.random.Generator, scene: Scene) -> Question | None:
    """As in :mod:`questions`, small and large objects told apart by the type."""
    asked = questions.ask_attribute(rng, scene)
    return asked and replace(asked, type=f"{asked.mentions[0].entities[0].size} attribute")


ASKERS: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "reading": questions.ask_reading,
    "by object": ask_by_object,
    "by sign": ask_by_sign,
    "attribute": ask_attribute,
    "existence": questions.ask_existence,
    "counting": questions.ask_counting,
    "relation": questions.ask_relation,
}
#: What `Question.type` may say, those that ask for small text first.
TYPES = (
    "reading", "sign by object", "color by object", "object by sign", "small attribute", "large attribute",
    "existence", "counting", "relation",
)  # fmt: skip
#: Probability of each asker, in training and, by default, in the task.
TRAINING_MIX = (0.22, 0.26, 0.12, 0.08, 0.06, 0.16, 0.1)
TASK_MIX = (0.36, 0.08, 0.08, 0.2, 0.08, 0.08, 0.12)


def ask(rng: np.random.Generator, scene: Scene, count: int, mix: tuple[float, ...] = TASK_MIX) -> list[Question]:
    """Up to ``count`` different questions about a scene; ``mix`` gives the probability of each of ``ASKERS``."""
    asked: dict[str, Question] = {}
    for name in rng.choice(list(ASKERS), 4 * count + 6, p=mix):
        question = ASKERS[str(name)](rng, scene)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())


def split_questions(
    split: str, n_scenes: int, per_scene: int, seed: int = 0, layout: str | None = None
) -> Iterator[tuple[HighResScene, Image.Image, list[Question]]]:
    """Scenes of a split with their image and questions; every ``seed`` has ten thousand scenes of its own."""
    if not 0 < n_scenes <= 10_000:
        raise ValueError(f"n_scenes: {n_scenes} is outside 1..10000, the scenes of one seed")
    for index in range(n_scenes):
        scene = generate(scenes.scene_seed(split, 10_000 * seed + index), layout)
        yield scene, draw(scene), ask(np.random.default_rng((scene.seed, seed, 11)), scene, per_scene)
