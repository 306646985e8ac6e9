"""Synthetic scenes for the embedded model: generator, renderer and a label for every patch.

A scene is a list of entities on a grid of 14-pixel patches. Three kinds exist:

* *objects*: one of eight filled shapes, with a colour, a size and a pattern; questions are about these;
* *signs*: dark boards with a coloured frame that carry a word of two or three letters;
* *scribbles*: coloured strokes that look salient and that no question asks for.

A scene may fill the whole 24x24 grid (336 px) or a smaller window of it. A window keeps its place in the
full grid (``top``, ``left``), so coordinates mean the same thing at every size. Everything about a scene
follows from ``(seed, grid)``, and the seed alone says which split the scene belongs to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

PATCH = 14
FULL_GRID = 24

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLORS = {
    "red": (214, 40, 40),
    "orange": (242, 136, 24),
    "yellow": (244, 220, 50),
    "green": (40, 160, 60),
    "cyan": (50, 205, 215),
    "blue": (40, 70, 215),
    "purple": (140, 50, 180),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
SIZES = ("small", "large")
PATTERNS = ("solid", "striped", "spotted")
KINDS = ("background", "object", "sign", "scribble")
MAX_WORD = 3

#: Letters are polylines on a 4 (wide) x 6 (high) lattice, so that no font file is needed.
LETTERS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "A": (((0, 6), (2, 0), (4, 6)), ((0.8, 4), (3.2, 4))),
    "E": (((4, 0), (0, 0), (0, 6), (4, 6)), ((0, 3), (3, 3))),
    "H": (((0, 0), (0, 6)), ((4, 0), (4, 6)), ((0, 3), (4, 3))),
    "K": (((0, 0), (0, 6)), ((4, 0), (0, 3), (4, 6))),
    "L": (((0, 0), (0, 6), (4, 6)),),
    "N": (((0, 6), (0, 0), (4, 6), (4, 0)),),
    "O": (((1, 0), (3, 0), (4, 1), (4, 5), (3, 6), (1, 6), (0, 5), (0, 1), (1, 0)),),
    "T": (((0, 0), (4, 0)), ((2, 0), (2, 6))),
    "V": (((0, 0), (2, 6), (4, 0)),),
    "X": (((0, 0), (4, 6)), ((4, 0), (0, 6))),
}
ALPHABET = tuple(LETTERS)

#: Per-patch label groups and their number of classes; class 0 means "none" (for ``kind``: background).
LABEL_GROUPS = {
    "kind": len(KINDS),
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "size": len(SIZES) + 1,
    "pattern": len(PATTERNS) + 1,
    "letter": len(ALPHABET) + 1,
    "slot": MAX_WORD + 1,
    "center": 2,
}

#: Half-open seed ranges, disjoint by construction.
SPLITS = {
    "train": (0, 1_000_000_000),
    "validation": (1_000_000_000, 1_100_000_000),
    "test": (1_100_000_000, 1_200_000_000),
}

_COVERAGE = 0.08
_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Entity:
    """One thing in a scene. ``row``/``col`` is the patch at its centre, ``height``/``width`` its box in patches."""

    kind: str
    row: int
    col: int
    height: int
    width: int
    color: str
    rgb: tuple[int, int, int]
    shift: tuple[float, float]
    style: int
    shape: str = ""
    size: str = ""
    pattern: str = ""
    word: str = ""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Patches covered, as half-open ``(row0, col0, row1, col1)``."""
        row, col = self.row - self.height // 2, self.col - self.width // 2
        return row, col, row + self.height, col + self.width

    def attributes(self) -> dict[str, str]:
        """The four attributes an object can be described by."""
        return {"size": self.size, "pattern": self.pattern, "color": self.color, "shape": self.shape}


@dataclass(frozen=True)
class Scene:
    """A picture's description; rows and columns of entities count from the window's own corner."""

    seed: int
    grid: int
    top: int
    left: int
    entities: tuple[Entity, ...] = field(repr=False)

    @property
    def objects(self) -> list[Entity]:
        return [entity for entity in self.entities if entity.kind == "object"]

    @property
    def signs(self) -> list[Entity]:
        return [entity for entity in self.entities if entity.kind == "sign"]


def split_of(seed: int) -> str:
    """Name of the split that a scene seed belongs to; raises ``ValueError`` outside all ranges."""
    for name, (start, stop) in SPLITS.items():
        if start <= seed < stop:
            return name
    raise ValueError(f"seed: {seed} is in no split; the ranges are {SPLITS}")


def scene_seed(split: str, index: int) -> int:
    """Seed of scene number ``index`` of a split."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is unknown, expected one of {sorted(SPLITS)}")
    start, stop = SPLITS[split]
    if not 0 <= index < stop - start:
        raise ValueError(f"index: {index} is outside 0..{stop - start - 1} of split {split!r}")
    return start + index


def generate_scene(seed: int, grid: int = FULL_GRID) -> Scene:
    """The scene of a seed on a ``grid`` x ``grid`` window; full scenes hold 8-14 objects and 2-4 signs."""
    if not 8 <= grid <= FULL_GRID:
        raise ValueError(f"grid: {grid} patches is outside 8..{FULL_GRID}")
    rng = np.random.default_rng((seed, grid))
    top, left = (int(value) for value in rng.integers(0, FULL_GRID - grid + 1, 2))
    n_objects, n_signs, n_scribbles = _how_many(rng, grid)
    shapes = rng.choice(SHAPES, min(5, 2 + n_objects // 2), replace=False)
    colors = rng.choice(COLOR_NAMES, min(5, 2 + n_objects // 2), replace=False)
    sign_colors = rng.permutation(COLOR_NAMES)

    taken = np.zeros((grid, grid), bool)
    entities: list[Entity] = []
    for index in range(n_signs):
        word = "".join(rng.choice(ALPHABET, int(rng.integers(2, MAX_WORD + 1))))
        place(entities, taken, rng, "sign", 3, 2 * len(word) + 1, str(sign_colors[index]), word=word)
    sizes = sorted(rng.choice(SIZES, n_objects, p=(0.65, 0.35)))  # "large" sorts first: the big ones need room
    for size in sizes:
        side = 3 if size == "small" else 5
        place(
            entities, taken, rng, "object", side, side, str(rng.choice(colors)),
            shape=str(rng.choice(shapes)), size=str(size), pattern=str(rng.choice(PATTERNS)),
        )  # fmt: skip
    for _ in range(n_scribbles):
        place(entities, taken, rng, "scribble", 3, 3, str(rng.choice(COLOR_NAMES)))
    return Scene(seed, grid, top, left, tuple(entities))


def _how_many(rng: np.random.Generator, grid: int) -> tuple[int, int, int]:
    """Numbers of objects, signs and scribbles, scaled to the window's area."""
    if grid >= 22:
        return int(rng.integers(8, 15)), int(rng.integers(2, 5)), int(rng.integers(2, 5))
    area = (grid / FULL_GRID) ** 2
    objects = int(rng.integers(max(1, round(9 * area)), round(16 * area) + 3))
    signs = int(rng.integers(0, 3)) if grid < 12 else int(rng.integers(1, max(1, round(4 * area)) + 2))
    return objects, signs, int(rng.integers(0, round(4 * area) + 2))


def place(entities, taken, rng, kind, height, width, color, **attributes) -> None:
    """Add an entity at a free random place, or nothing if none is found; ``taken`` is updated."""
    found = free_place(rng, taken, height, width)
    if found:
        put(entities, taken, rng, kind, *found, height, width, color, **attributes)


def free_place(rng: np.random.Generator, taken: np.ndarray, height: int, width: int) -> tuple[int, int] | None:
    """First patch of a random free box, None if 60 tries find none."""
    grid = taken.shape[0]
    if width > grid:
        return None
    for _ in range(60):
        row, col = int(rng.integers(0, grid - height + 1)), int(rng.integers(0, grid - width + 1))
        if not taken[row : row + height, col : col + width].any():
            return row, col
    return None


def put(entities, taken, rng, kind, row, col, height, width, color, **attributes) -> None:
    """Add an entity whose box begins at a patch; ``taken`` is updated."""
    taken[row : row + height, col : col + width] = True
    rgb = tuple(int(value) for value in np.clip(np.array(COLORS[color]) + rng.integers(-10, 11, 3), 0, 255))
    shift = tuple(float(value) for value in rng.uniform(-1.5, 1.5, 2))
    style = int(rng.integers(1 << 30))
    center = row + height // 2, col + width // 2
    entities.append(Entity(kind, *center, height, width, color, rgb, shift, style, **attributes))


def render(scene: Scene) -> Image.Image:
    """The scene's picture, RGB, ``14 * grid`` pixels a side."""
    return Image.fromarray(_draw(scene)[0])


def render_with_labels(scene: Scene) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Picture ``uint8 [14*grid, 14*grid, 3]`` and one label map ``int64 [grid, grid]`` per ``LABEL_GROUPS`` entry."""
    image, coverage = _draw(scene)
    return image, _labels(scene, coverage)


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Label maps ``int64 [grid, grid]``: what a patch shows (at least 8 % of its pixels, or its entity's centre)."""
    return _labels(scene, [_coverage(_mask(entity), entity) for entity in scene.entities])


def _labels(scene: Scene, coverage: list[np.ndarray]) -> dict[str, np.ndarray]:
    labels = {name: np.zeros((scene.grid, scene.grid), np.int64) for name in LABEL_GROUPS}
    for entity, covered in zip(scene.entities, coverage, strict=True):
        row0, col0, row1, col1 = entity.box
        window = (slice(row0, row1), slice(col0, col1))
        shown = covered >= _COVERAGE
        shown[entity.height // 2, entity.width // 2] = True
        labels["kind"][window][shown] = KINDS.index(entity.kind)
        labels["color"][window][shown] = COLOR_NAMES.index(entity.color) + 1
        if entity.kind == "object":
            labels["shape"][window][shown] = SHAPES.index(entity.shape) + 1
            labels["size"][window][shown] = SIZES.index(entity.size) + 1
            labels["pattern"][window][shown] = PATTERNS.index(entity.pattern) + 1
        for slot, letter in enumerate(entity.word):
            labels["letter"][row0:row1, col0 + 1 + 2 * slot] = ALPHABET.index(letter) + 1
            labels["slot"][row0:row1, col0 + 1 + 2 * slot] = slot + 1
        if entity.kind != "scribble":
            labels["center"][entity.row, entity.col] = 1
    return labels


def _draw(scene: Scene) -> tuple[np.ndarray, list[np.ndarray]]:
    """Picture ``uint8`` and, per entity, the covered share of each patch of its box."""
    rng = np.random.default_rng((scene.seed, scene.grid, 1))
    side = PATCH * scene.grid
    canvas = draw_background(rng, side)
    coverage = []
    for entity in scene.entities:
        mask = _mask(entity)
        coverage.append(_coverage(mask, entity))
        row0, col0, row1, col1 = (PATCH * edge for edge in entity.box)
        region = canvas[row0:row1, col0:col1]
        region += mask[..., None] * (_paint(entity) - region)
    canvas += 2.0 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), coverage


def draw_entity(entity: Entity) -> tuple[np.ndarray, np.ndarray]:
    """An entity's opacity, ``float32 [height, width]`` in pixels of its box, and its colours, broadcastable to it."""
    return _mask(entity), _paint(entity)


def draw_background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A linear gradient between two muted colours, ``float32 [side, side, 3]``."""
    first, second = rng.uniform(85, 165, (2, 1, 1, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    ramp = 0.5 + (axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)) / math.sqrt(2)
    return first + ramp[..., None] * (second - first)


def _coverage(mask: np.ndarray, entity: Entity) -> np.ndarray:
    return mask.reshape(entity.height, PATCH, entity.width, PATCH).mean((1, 3))


def _mask(entity: Entity) -> np.ndarray:
    """Antialiased opacity of an entity over its box, ``float32 [14*height, 14*width]`` in 0..1."""
    height, width = PATCH * entity.height, PATCH * entity.width
    scale = _SUPERSAMPLE
    tile = Image.new("L", (width * scale, height * scale))
    draw = ImageDraw.Draw(tile)
    center = ((width / 2 + entity.shift[1]) * scale, (height / 2 + entity.shift[0]) * scale)
    if entity.kind == "sign":
        inset = 2 * scale
        draw.rectangle((inset, inset, width * scale - inset, height * scale - inset), fill=255)
    elif entity.kind == "scribble":
        _draw_scribble(draw, center, 18 * scale, entity.style)
    else:
        _draw_shape(draw, entity.shape, center, (18.5 if entity.size == "small" else 31) * scale)
    return np.asarray(tile.reduce(scale), np.float32) / 255


def _polygon(center, radius, points) -> list[tuple[float, float]]:
    return [(center[0] + radius * x, center[1] + radius * y) for x, y in points]


_STAR = [
    (
        (1.0 if k % 2 == 0 else 0.42) * math.sin(k * math.pi / 5),
        -(1.0 if k % 2 == 0 else 0.42) * math.cos(k * math.pi / 5),
    )
    for k in range(10)
]
_ARM = 0.34
_CROSS = [
    (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
    (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
]  # fmt: skip
_HEART = [
    (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1)
    for t in np.linspace(0, 2 * math.pi, 36, endpoint=False)
]
_POLYGONS = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": _STAR,
    "cross": _CROSS,
    "heart": _HEART,
}


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, center, radius: float) -> None:
    """Fill one of ``SHAPES`` around ``center`` (x, y); nothing reaches beyond ``radius``."""
    if shape in _POLYGONS:
        draw.polygon(_polygon(center, radius, _POLYGONS[shape]), fill=255)
        return
    draw.ellipse(_circle(center, radius), fill=255)
    if shape == "ring":
        draw.ellipse(_circle(center, 0.55 * radius), fill=0)


def _circle(center, radius: float) -> tuple[float, float, float, float]:
    return center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius


def _draw_scribble(draw: ImageDraw.ImageDraw, center, radius: float, style: int) -> None:
    """A thick zigzag, wave or arc: as colourful as an object, of no nameable shape."""
    rng = np.random.default_rng(style)
    angle = rng.uniform(0, math.pi)
    along = np.linspace(-0.95, 0.95, 24 if style % 3 else 5)
    bend = rng.uniform(0.3, 0.5)
    if style % 3 == 0:
        across = bend * np.where(np.arange(along.size) % 2, 1, -1)
    elif style % 3 == 1:
        across = bend * np.sin(along * rng.uniform(4, 7))
    else:
        across = 1.2 * bend * (1 - 2 * along**2)
    x = along * math.cos(angle) - across * math.sin(angle)
    y = along * math.sin(angle) + across * math.cos(angle)
    draw.line(_polygon(center, radius * 0.9, zip(x, y, strict=True)), fill=255, width=int(radius / 4.5), joint="curve")


def _paint(entity: Entity) -> np.ndarray:
    """Colours inside an entity's box, broadcastable to ``float32 [14*height, 14*width, 3]``."""
    color = np.array(entity.rgb, np.float32)
    if entity.kind == "sign":
        return _sign_face(entity, color)
    if entity.kind == "scribble" or entity.pattern == "solid":
        return color
    rng = np.random.default_rng(entity.style)
    y, x = np.mgrid[0 : PATCH * entity.height, 0 : PATCH * entity.width].astype(np.float32)
    phase = rng.uniform(0, 9, 2)
    if entity.pattern == "striped":
        angle = rng.choice((0.0, math.pi / 4, math.pi / 2, -math.pi / 4))
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle) + phase[0]) * (2 * math.pi / 9))
        dark = np.clip(0.5 + 1.8 * wave, 0, 1)
    else:
        distance = np.hypot((x + phase[0]) % 9 - 4.5, (y + phase[1]) % 9 - 4.5)
        dark = np.clip(3.3 - distance, 0, 1)
    return color * (1 - 0.7 * dark[..., None])


def _sign_face(entity: Entity, color: np.ndarray) -> np.ndarray:
    """A dark board in a frame of the sign's colour, with light letters two patches apart."""
    scale = _SUPERSAMPLE
    height, width = PATCH * entity.height, PATCH * entity.width
    frame = Image.new("L", (width * scale, height * scale), 255)
    ImageDraw.Draw(frame).rectangle((6 * scale, 6 * scale, (width - 6) * scale, (height - 6) * scale), fill=0)
    ink = Image.new("L", frame.size)
    draw = ImageDraw.Draw(ink)
    for slot, letter in enumerate(entity.word):
        x0 = (1.5 + 2 * slot) * PATCH - 8 + entity.shift[1]
        y0 = height / 2 - 11 + entity.shift[0]
        for line in LETTERS[letter]:
            points = [((x0 + 4 * x) * scale, (y0 + 22 / 6 * y) * scale) for x, y in line]
            draw.line(points, fill=255, width=int(3.6 * scale), joint="curve")
    framed = np.asarray(frame.reduce(scale), np.float32)[..., None] / 255
    inked = np.asarray(ink.reduce(scale), np.float32)[..., None] / 255
    face = color * framed + 30 * (1 - framed)
    return face + inked * (235 - face)
