"""Questions about a synthetic scene, each with one short answer that follows from the scene's description.

Five types, reported separately: ``attribute``, ``existence``, ``counting``, ``relation`` and ``reading``. An object is
named by attributes that no other object of the scene shares, so a named object is always one object. Scribbles are
never named and never counted; signs are named by the colour of their frame.

Any of them can be asked with options to choose from (:class:`Choice`); the answer is then a letter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from eval.mini import scenes
from eval.mini.scenes import Entity, Scene

ATTRIBUTES = ("size", "pattern", "color", "shape")
VALUES = {"size": scenes.SIZES, "pattern": scenes.PATTERNS, "color": scenes.COLOR_NAMES, "shape": scenes.SHAPES}
MAX_COUNT = 4
#: Smallest distance, in patches, between two objects whose places are compared.
MIN_GAP = 2
#: Letters of the options of a multiple-choice question.
LETTERS = "ABCD"
DIRECTIONS = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Mention:
    """A noun phrase and what it means: the objects or the sign, and their rows and columns in the full grid."""

    phrase: str
    entities: tuple[Entity, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Question:
    """A question, its answer as text, its type, and the things it speaks of."""

    text: str
    answer: str
    type: str
    mentions: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A question with options: its plain text, the options in the order of ``LETTERS``, the right letter, its type."""

    question: str
    options: tuple[str, ...]
    answer: str
    type: str


def mention(scene: Scene, text: str, entities: list[Entity]) -> Mention:
    """What a phrase means in a scene."""
    return Mention(text, tuple(entities), tuple((scene.top + item.row, scene.left + item.col) for item in entities))


def plural(noun: str) -> str:
    """Plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def phrase(attributes: dict[str, str], many: bool = False) -> str:
    """``{"color": "red", "size": "small"}`` -> ``small red object``; adjectives keep the order of ``ATTRIBUTES``."""
    noun = attributes.get("shape", "object")
    words = [attributes[name] for name in ATTRIBUTES[:3] if name in attributes]
    return " ".join([*words, plural(noun) if many else noun])


def matches(objects: list[Entity], attributes: dict[str, str]) -> list[Entity]:
    """Objects that have all the given attributes."""
    return [item for item in objects if all(getattr(item, name) == value for name, value in attributes.items())]


def describe(
    rng: np.random.Generator, objects: list[Entity], target: Entity, hidden: str = ""
) -> dict[str, str] | None:
    """Attributes, never ``hidden``, that only ``target`` has; ``None`` if there are none.

    Attributes join in random order until the description is unique; in three of ten cases one more joins.
    """
    names = [name for name in rng.permutation(ATTRIBUTES) if name != hidden]
    chosen: dict[str, str] = {}
    for index, name in enumerate(names):
        chosen[str(name)] = getattr(target, name)
        if matches(objects, chosen) == [target]:
            if index + 1 < len(names) and rng.random() < 0.3:
                chosen[str(names[index + 1])] = getattr(target, names[index + 1])
            return chosen
    return None


def ask_attribute(rng: np.random.Generator, scene: Scene) -> Question | None:
    """The hidden attribute of a uniquely described object."""
    objects = scene.objects
    hidden = str(rng.choice(ATTRIBUTES, p=(0.15, 0.2, 0.35, 0.3)))
    target = objects[rng.integers(len(objects))]
    described = describe(rng, objects, target, hidden)
    if described is None:
        return None
    name = phrase(described)
    return Question(
        f"What {hidden} is the {name}?", getattr(target, hidden), "attribute", (mention(scene, name, [target]),)
    )


def ask_existence(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Is such an object there? Half the time no: then one attribute of an object that is there was changed."""
    objects = scene.objects
    target = objects[rng.integers(len(objects))]
    names = [str(name) for name in rng.permutation(ATTRIBUTES)[: rng.integers(2, 4)]]
    attributes = {name: getattr(target, name) for name in names}
    if rng.random() < 0.5:
        changed = names[rng.integers(len(names))]
        others = [value for value in VALUES[changed] if value != attributes[changed]]
        attributes[changed] = str(rng.choice(others))
        if matches(objects, attributes):
            return None
    elif rng.random() < 0.1 * len(names):
        # A changed attribute often gives an object that exists after all; dropping as many positives keeps the balance.
        return None
    found = matches(objects, attributes)
    name = phrase(attributes)
    article = "an" if name.startswith("orange") else "a"
    return Question(
        f"Is there {article} {name}?", "yes" if found else "no", "existence", (mention(scene, name, found),)
    )


def ask_counting(rng: np.random.Generator, scene: Scene) -> Question | None:
    """How many objects have one or two given attributes: 0 to 4, each number wished for equally often."""
    objects = scene.objects
    wished = int(rng.integers(MAX_COUNT + 1))
    for _ in range(6):
        target = objects[rng.integers(len(objects))]
        names = [str(name) for name in rng.permutation(ATTRIBUTES)[: rng.integers(1, 3)]]
        attributes = {name: getattr(target, name) for name in names}
        if wished == 0:
            changed = names[rng.integers(len(names))]
            attributes[changed] = str(rng.choice(VALUES[changed]))
        found = matches(objects, attributes)
        if len(found) == wished:
            name = phrase(attributes, many=True)
            return Question(f"How many {name} are there?", str(wished), "counting", (mention(scene, name, found),))
    return None


def ask_relation(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Where one object is seen from another: left or right, above or below; a quarter asks for yes or no."""
    objects = scene.objects
    if len(objects) < 2:
        return None
    first, second = (objects[index] for index in rng.choice(len(objects), 2, replace=False))
    horizontal = rng.random() < 0.5
    gap = first.col - second.col if horizontal else first.row - second.row
    if abs(gap) < MIN_GAP:
        return None
    named = [describe(rng, objects, item) for item in (first, second)]
    if None in named:
        return None
    subject, other = (phrase(attributes) for attributes in named)
    meant = mention(scene, subject, [first]), mention(scene, other, [second])
    low, high = ("left", "right") if horizontal else ("above", "below")
    link = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
    truth = low if gap < 0 else high
    if rng.random() < 0.25:
        claim = low if rng.random() < 0.5 else high
        return Question(
            f"Is the {subject} {link[claim]} the {other}?", "yes" if claim == truth else "no", "relation", meant
        )
    return Question(f"Is the {subject} {low} or {link[high]} the {other}?", truth, "relation", meant)


def ask_reading(rng: np.random.Generator, scene: Scene) -> Question | None:
    """The word on the sign whose frame has a given colour; sign colours differ within a scene."""
    signs = scene.signs
    if not signs:
        return None
    sign = signs[rng.integers(len(signs))]
    name = f"{sign.color} sign"
    return Question(f"What does the {name} say?", sign.word, "reading", (mention(scene, name, [sign]),))


ASKERS: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "attribute": ask_attribute,
    "existence": ask_existence,
    "counting": ask_counting,
    "relation": ask_relation,
    "reading": ask_reading,
}
TYPES = tuple(ASKERS)
DEFAULT_MIX = {"attribute": 0.28, "existence": 0.2, "counting": 0.18, "relation": 0.22, "reading": 0.12}


def ask(rng: np.random.Generator, scene: Scene, count: int, mix: dict[str, float] | None = None) -> list[Question]:
    """Up to ``count`` different questions about a scene, their types drawn from ``mix`` (type -> probability)."""
    if not scene.objects and not scene.signs:
        return []
    mix = mix or DEFAULT_MIX
    unknown = sorted(set(mix) - set(TYPES))
    if unknown:
        raise ValueError(f"mix: question types {unknown} are unknown, expected some of {list(TYPES)}")
    names = list(mix)
    shares = np.array([mix[name] for name in names], float)
    questions: dict[str, Question] = {}
    for name in rng.choice(names, 3 * count + 6, p=shares / shares.sum()):
        if name != "reading" and not scene.objects:
            continue
        question = ASKERS[str(name)](rng, scene)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == count:
            break
    return list(questions.values())


def split_scenes(split: str, n_scenes: int, seed: int = 0) -> Iterator[Scene]:
    """Full-size scenes of a split; every ``seed`` has ten thousand of its own."""
    if n_scenes > 10_000:
        raise ValueError(f"n_scenes: {n_scenes} exceeds the 10000 scenes of one seed")
    for index in range(n_scenes):
        yield scenes.generate_scene(scenes.scene_seed(split, 10_000 * seed + index))


def scene_questions(
    split: str, n_scenes: int, per_scene: int = 5, seed: int = 0, mix: dict[str, float] | None = None
) -> Iterator[tuple[Image.Image, str, str, str, int]]:
    """Full-size pictures with questions: ``(image, question, answer, type, scene_id)``, grouped by scene.

    ``scene_id`` is the scene's seed, so ``scenes.split_of(scene_id) == split``. ``seed`` chooses the scenes within the
    split (disjoint blocks of ten thousand) and the questions. The default mix of types follows training; pass equal
    shares for a balanced task.
    """
    for scene in split_scenes(split, n_scenes, seed):
        image = scenes.render(scene)
        rng = np.random.default_rng((scene.seed, seed, 2))
        for question in ask(rng, scene, per_scene, mix):
            yield image, question.text, question.answer, question.type, scene.seed


def choice_text(question: str, options: Sequence[str]) -> str:
    """The prompt of a multiple-choice question: the question, then a line ``A. red`` for each option."""
    lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join((question, *lines))


def distractors(rng: np.random.Generator, scene: Scene, question: Question) -> list[str]:
    """Wrong answers to a question, the most plausible first: what the scene shows elsewhere, then what it might."""
    if question.answer in ("yes", "no"):
        tempting, others = [], ["yes", "no"]
    elif question.type == "reading":
        tempting = [sign.word for sign in scene.signs]
        letters = [str(letter) for letter in rng.choice(scenes.ALPHABET, len(LETTERS), replace=False)]
        others = [letter + question.answer[1:] for letter in letters]
    elif question.type == "relation":
        tempting = [side for side in DIRECTIONS if side in question.text.split()]
        others = list(DIRECTIONS)
    elif question.type == "counting":
        tempting, others = [], [str(number) for number in range(MAX_COUNT + 1)]
    else:
        (name,) = (name for name, values in VALUES.items() if question.answer in values)
        tempting, others = [getattr(item, name) for item in scene.objects], list(VALUES[name])
    shuffled = [str(item) for part in (tempting, others) if part for item in rng.permutation(part)]
    return [answer for answer in dict.fromkeys(shuffled) if answer != question.answer]


def multiple_choice(rng: np.random.Generator, scene: Scene, question: Question) -> Choice:
    """Offer a question's answer among one to three distractors, more rather than fewer; its place is random."""
    wrong = distractors(rng, scene, question)
    if question.type == "relation" and len(wrong) > 1:
        count = int(rng.choice((1, 3)))
    else:
        counts = np.arange(1, min(len(wrong), len(LETTERS) - 1) + 1)
        count = int(rng.choice(counts, p=counts / counts.sum()))
    options = [str(option) for option in rng.permutation([question.answer, *wrong[:count]])]
    return Choice(question.text, tuple(options), LETTERS[options.index(question.answer)], question.type)


def choice_questions(
    split: str, n_scenes: int, per_scene: int = 5, seed: int = 0, mix: dict[str, float] | None = None
) -> Iterator[tuple[Image.Image, Choice, int]]:
    """Full-size pictures with multiple-choice questions, ``(image, choice, scene_id)``, grouped by scene.

    Scenes, ``seed`` and ``mix`` (of the underlying types) are as in :func:`scene_questions`; the questions differ.
    """
    for scene in split_scenes(split, n_scenes, seed):
        image = scenes.render(scene)
        rng = np.random.default_rng((scene.seed, seed, 5))
        for question in ask(rng, scene, per_scene, mix):
            yield image, multiple_choice(rng, scene, question), scene.seed
