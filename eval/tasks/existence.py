"""What the synthetic yes/no tasks share: the scenes of a task, and objects that are in them or are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np
from PIL import Image

from eval.mini import scenes
from eval.mini.questions import ATTRIBUTES, VALUES, matches, phrase, split_scenes
from eval.mini.scenes import Scene

Attributes = dict[str, str]


def pictures(split: str, n_scenes: int, seed: int) -> Iterator[tuple[Scene, Image.Image, np.random.Generator]]:
    """A task's scenes, their pictures and a generator of random numbers for the questions about each."""
    for scene in split_scenes(split, n_scenes, seed):
        yield scene, scenes.render(scene), np.random.default_rng((scene.seed, seed, 3))


def is_there(attributes: Attributes) -> str:
    """The question, worded as in training, whether there is an object of these attributes."""
    name = phrase(attributes)
    return f"Is there {'an' if name.startswith('orange') else 'a'} {name}?"


def present(rng: np.random.Generator, scene: Scene, must: str = "") -> Attributes:
    """Two or three attributes, among them ``must`` if it is given, of an object that is there."""
    target = scene.objects[rng.integers(len(scene.objects))]
    return {name: getattr(target, name) for name in _names(rng, must)}


def absent_random(rng: np.random.Generator, scene: Scene) -> Attributes:
    """Two or three attributes of any kind that no object has together."""
    while True:
        attributes = {name: str(rng.choice(VALUES[name])) for name in _names(rng)}
        if not matches(scene.objects, attributes):
            return attributes


def absent_popular(rng: np.random.Generator, scene: Scene) -> Attributes:
    """Two or three attributes that no object has together, of all such the one to be expected most.

    An attribute is expected as often as it occurs in the scene, several together as if they were independent.
    """
    seen = {name: Counter(getattr(item, name) for item in scene.objects) for name in ATTRIBUTES}
    while True:
        names = _names(rng)
        combinations = (dict(zip(names, values, strict=True)) for values in product(*(VALUES[name] for name in names)))
        absent = [attributes for attributes in combinations if not matches(scene.objects, attributes)]
        expected = [prod(seen[name][value] for name, value in attributes.items()) for attributes in absent]
        if absent and max(expected):
            return absent[rng.choice(np.flatnonzero(np.array(expected) == max(expected)))]


def absent_changed(rng: np.random.Generator, scene: Scene, attributes: Attributes, name: str) -> Attributes | None:
    """The attributes with another value of one of them, so that no object has them; None if there is no such value."""
    changed = [{**attributes, name: value} for value in VALUES[name]]
    absent = [other for other in changed if not matches(scene.objects, other)]
    return absent[rng.integers(len(absent))] if absent else None


def absent_adversarial(rng: np.random.Generator, scene: Scene) -> Attributes:
    """Two or three attributes of an object that is there, one of them changed so that no object has them together."""
    while True:
        attributes = present(rng, scene)
        changed = absent_changed(rng, scene, attributes, str(rng.choice(list(attributes))))
        if changed:
            return changed


def _names(rng: np.random.Generator, must: str = "") -> list[str]:
    """Two or three names of attributes in random order, as many of each kind as in training."""
    others = [str(name) for name in rng.permutation(ATTRIBUTES) if name != must]
    count = int(rng.integers(2, 4))
    return [must, *others[: count - 1]] if must else others[:count]
