"""Synthetic clips for the embedded video model: things that stay, move, appear or blink before a still background.

A clip is eight moments of a window of the embedded world (see :mod:`eval.mini.scenes`); a full one is 16 x 16
patches, 224 px. Objects never touch: whoever moves has a corridor of its own. What happens is told by the moments
together: a single one shows neither where something is going, nor when it came, nor how often it was gone.
Everything about a clip follows from ``(seed, grid)``, and the seed alone says which split it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eval.mini import scenes
from eval.mini.scenes import PATCH, Entity, Scene

MOMENTS = 8
CLIP_GRID = 16
#: Row and column, in the tower's full grid, of a full clip's corner: its middle.
CORNER = (scenes.FULL_GRID - CLIP_GRID) // 2

MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
BEHAVIOURS = ("still", "moving", "appearing", "blinking")
MAX_BLINKS = 3
#: Moments in which a blinking object is gone, never two in a row, by how often.
_GONE = {
    1: [(moment,) for moment in range(1, 7)],
    2: [(first, second) for first in range(1, 5) for second in range(first + 2, 7)],
    3: [(1, 3, 5), (1, 3, 6), (1, 4, 6), (2, 4, 6)],
}
#: Fewest and most of each behaviour, by window side.
_HOW_MANY = {
    8: {"moving": (0, 2), "appearing": (0, 3), "blinking": (0, 1), "still": (0, 1)},
    12: {"moving": (0, 3), "appearing": (0, 3), "blinking": (0, 2), "still": (0, 2)},
    16: {"moving": (0, 4), "appearing": (0, 4), "blinking": (0, 2), "still": (0, 2)},
}


@dataclass(frozen=True)
class Actor:
    """An object and what it does; ``entity`` says where it is at first, ``distance`` how far it goes, in patches."""

    entity: Entity
    behaviour: str
    direction: str = ""
    distance: int = 0
    gone: frozenset[int] = frozenset()

    def place(self, moment: int) -> tuple[int, int]:
        """Row and column of its centre at a moment, in patches of the window."""
        down, right = MOVES.get(self.direction, (0, 0))
        way = round(self.distance * moment / (MOMENTS - 1))
        return self.entity.row + down * way, self.entity.col + right * way

    @property
    def first_seen(self) -> int:
        """The first moment in which it is there."""
        return next(moment for moment in range(MOMENTS) if moment not in self.gone)

    @property
    def blinks(self) -> int:
        """How often it is gone between two moments in which it is there."""
        return len(self.gone) - self.first_seen


@dataclass(frozen=True)
class Clip:
    """A clip's description; rows and columns count from the window's own corner."""

    scene: Scene
    actors: tuple[Actor, ...] = field(repr=False)

    @property
    def seed(self) -> int:
        return self.scene.seed

    def actor(self, entity: Entity) -> Actor:
        """Who an entity of the scene is."""
        return next(actor for actor in self.actors if actor.entity == entity)

    def doing(self, behaviour: str) -> list[Actor]:
        """All who behave in one way."""
        return [actor for actor in self.actors if actor.behaviour == behaviour]


def generate_clip(seed: int, grid: int = CLIP_GRID) -> Clip:
    """The clip of a seed on a ``grid`` x ``grid`` window of 8, 12 or 16 patches; at least one object is in it."""
    if grid not in _HOW_MANY:
        raise ValueError(f"grid: got {grid} patches, expected one of {sorted(_HOW_MANY)}")
    rng = np.random.default_rng((seed, grid, 6))
    top, left = (CORNER + int(value) for value in rng.integers(0, CLIP_GRID - grid + 1, 2))
    shapes = rng.choice(scenes.SHAPES, 5, replace=False)
    colors = rng.choice(scenes.COLOR_NAMES, 5, replace=False)
    taken = np.zeros((grid, grid), bool)
    actors: list[Actor] = []
    while not actors:
        for behaviour in (str(name) for name in rng.permutation(BEHAVIOURS)):
            fewest, most = _HOW_MANY[grid][behaviour]
            for _ in range(int(rng.integers(fewest, most + 1))):
                actor = _place(rng, taken, behaviour, str(rng.choice(shapes)), str(rng.choice(colors)))
                actors += [] if actor is None else [actor]
    return Clip(Scene(seed, grid, top, left, tuple(actor.entity for actor in actors)), tuple(actors))


def _place(rng: np.random.Generator, taken: np.ndarray, behaviour: str, shape: str, color: str) -> Actor | None:
    """An actor at a free random place with room for its way, None if 40 tries find none; ``taken`` is updated."""
    grid = len(taken)
    size = "large" if grid > 8 and rng.random() < 0.25 else "small"
    side = 5 if size == "large" else 3
    for _ in range(40):
        direction = str(rng.choice(list(MOVES))) if behaviour == "moving" else ""
        distance = int(rng.integers(3, min(grid - side, MOMENTS - 1) + 1)) if direction else 0
        down, right = MOVES.get(direction, (0, 0))
        height, width = side + abs(down) * distance, side + abs(right) * distance
        row, col = int(rng.integers(0, grid - height + 1)), int(rng.integers(0, grid - width + 1))
        room = taken[row : row + height, col : col + width]
        if room.any():
            continue
        room[:] = True
        begin_row = row + (distance if down < 0 else 0) + side // 2
        begin_col = col + (distance if right < 0 else 0) + side // 2
        rgb = tuple(int(value) for value in np.clip(np.array(scenes.COLORS[color]) + rng.integers(-10, 11, 3), 0, 255))
        entity = Entity(
            "object", begin_row, begin_col, side, side, color, rgb, (0.0, 0.0), int(rng.integers(1 << 30)),
            shape=shape, size=size, pattern=str(rng.choice(scenes.PATTERNS)),
        )  # fmt: skip
        return Actor(entity, behaviour, direction, distance, _gone(rng, behaviour))
    return None


def _gone(rng: np.random.Generator, behaviour: str) -> frozenset[int]:
    """The moments in which an actor is not there."""
    if behaviour == "appearing":
        return frozenset(range(int(rng.integers(1, MOMENTS - 1))))
    if behaviour == "blinking":
        choices = _GONE[int(rng.integers(1, MAX_BLINKS + 1))]
        return frozenset(choices[rng.integers(len(choices))])
    return frozenset()


def draw_clip(clip: Clip, stride: int = 1) -> np.ndarray:
    """Frames ``uint8 [frames, 14*grid, 14*grid, 3]``: the eight moments, or ``stride`` frames from each to the next."""
    rng = np.random.default_rng((clip.seed, clip.scene.grid, 7))
    side = PATCH * clip.scene.grid
    background = scenes.draw_background(rng, side) + 2.0 * rng.standard_normal((side, side, 3), dtype=np.float32)
    drawn = [(actor, *scenes.draw_entity(actor.entity)) for actor in clip.actors]
    return np.stack([_frame(background, drawn, *divmod(number, stride), stride) for number in _numbers(stride)])


def _numbers(stride: int) -> range:
    return range(stride * (MOMENTS - 1) + 1)


def _frame(background: np.ndarray, drawn: list, moment: int, step: int, stride: int) -> np.ndarray:
    """The frame ``step`` of ``stride`` steps after a moment; what comes or goes does so half-way to the next."""
    canvas = background.copy()
    for actor, mask, paint in drawn:
        if moment + (2 * step >= stride) in actor.gone:
            continue
        here, there = actor.place(moment), actor.place(min(moment + 1, MOMENTS - 1))
        middle = ((one * (stride - step) + other * step) / stride for one, other in zip(here, there, strict=True))
        top, left = (round(PATCH * (value - actor.entity.height // 2)) for value in middle)
        region = canvas[top : top + len(mask), left : left + len(mask)]
        region += mask[..., None] * (paint - region)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def trails(clip: Clip) -> np.ndarray:
    """What each patch's object has done so far, ``float32 [moments, grid*grid, 5]``; NaN where there is none.

    Rows and columns gone since the first moment, the moment, the first moment in which it was seen, and how often it
    was gone since then, all in eighths.
    """
    grid = clip.scene.grid
    told = np.full((MOMENTS, grid, grid, 5), np.nan, np.float32)
    for actor in clip.actors:
        reach, gone = actor.entity.height // 2, 0
        for moment in range(MOMENTS):
            if moment in actor.gone:
                gone += moment > actor.first_seen
                continue
            row, col = actor.place(moment)
            box = told[moment, row - reach : row + reach + 1, col - reach : col + reach + 1]
            way = row - actor.entity.row, col - actor.entity.col
            box[:] = np.array((*way, moment, actor.first_seen, gone)) / MOMENTS
    return told.reshape(MOMENTS, grid * grid, 5)


def owners(clip: Clip) -> np.ndarray:
    """Which actor each patch shows, ``int64 [moments, grid*grid]``; -1 where none does."""
    grid = clip.scene.grid
    whose = np.full((MOMENTS, grid, grid), -1)
    for number, actor in enumerate(clip.actors):
        reach = actor.entity.height // 2
        for moment in set(range(MOMENTS)) - actor.gone:
            row, col = actor.place(moment)
            whose[moment, row - reach : row + reach + 1, col - reach : col + reach + 1] = number
    return whose.reshape(MOMENTS, grid * grid)
