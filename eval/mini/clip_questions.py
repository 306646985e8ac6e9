"""Questions about a synthetic clip: one short answer each, which follows from the clip's description.

Five types: ``attribute`` can be told from one frame; ``motion``, ``order``, ``counting`` and ``blinking`` need several.
Objects are named as in :mod:`eval.mini.questions`, by attributes that no other object of the clip shares. What
appears is only asked without a name where nothing blinks: who blinks appears again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from eval.mini import questions, scenes
from eval.mini.clip_scenes import Actor, Clip, generate_clip
from eval.mini.questions import Mention, Question, describe, matches, mention, phrase

#: What the questions say beside the words of :func:`eval.mini.data.build_tokenizer`.
WORDS = (
    "direction", "Does", "move", "appear", "appears", "first", "last", "before", "after", "up", "down", "times",
    "blink",
)  # fmt: skip
MAX_COUNT = 4


def _named(rng: np.random.Generator, clip: Clip, actor: Actor | None) -> Mention | None:
    """A noun phrase for an actor, None if nothing sets it apart."""
    described = actor and describe(rng, clip.scene.objects, actor.entity)
    return mention(clip.scene, phrase(described), [actor.entity]) if described else None


def _one(rng: np.random.Generator, clip: Clip, *behaviours: str) -> Actor | None:
    """An actor that behaves in one of some ways."""
    fitting = [actor for actor in clip.actors if actor.behaviour in behaviours]
    return fitting[rng.integers(len(fitting))] if fitting else None


def ask_attribute(rng: np.random.Generator, clip: Clip) -> Question | None:
    """The hidden attribute of a uniquely described object."""
    return questions.ask_attribute(rng, clip.scene)


def ask_motion(rng: np.random.Generator, clip: Clip) -> Question | None:
    """Where an object goes; a third asks whether it moves at all, half of these of one that does not."""
    if rng.random() < 2 / 3:
        actor = _one(rng, clip, "moving")
        name = _named(rng, clip, actor)
        return name and Question(f"What direction does the {name.phrase} move?", actor.direction, "motion", (name,))
    moves = rng.random() < 0.5
    name = _named(rng, clip, _one(rng, clip, *(("moving",) if moves else ("still", "appearing", "blinking"))))
    return name and Question(f"Does the {name.phrase} move?", "yes" if moves else "no", "motion", (name,))


def ask_order(rng: np.random.Generator, clip: Clip) -> Question | None:
    """Which of two objects appears before the other, or what the first or last to appear looks like."""
    coming = clip.doing("appearing")
    if len(coming) < 2 or len({actor.first_seen for actor in coming}) < len(coming):
        return None
    if rng.random() < 0.4:
        return None if clip.doing("blinking") else _first_or_last(rng, clip, coming)
    first, second = (coming[index] for index in rng.choice(len(coming), 2, replace=False))
    names = _named(rng, clip, first), _named(rng, clip, second)
    if None in names:
        return None
    truth = "before" if first.first_seen < second.first_seen else "after"
    text = f"Does the {names[0].phrase} appear before or after the {names[1].phrase}?"
    return Question(text, truth, "order", names)


def _first_or_last(rng: np.random.Generator, clip: Clip, coming: list[Actor]) -> Question:
    which, attribute = str(rng.choice(("first", "last"))), str(rng.choice(("color", "shape")))
    actor = (min if which == "first" else max)(coming, key=lambda one: one.first_seen)
    meant = mention(clip.scene, f"appears {which}", [actor.entity])
    return Question(f"What {attribute} appears {which}?", getattr(actor.entity, attribute), "order", (meant,))


def ask_counting(rng: np.random.Generator, clip: Clip) -> Question | None:
    """How many objects, all or those with one attribute, move, or appear where nothing blinks; 0 to 4."""
    behaviour, verb = ("appearing", "appear") if rng.random() < 0.35 else ("moving", "move")
    if verb == "appear" and clip.doing("blinking"):
        return None
    attributes = {}
    if rng.random() < 0.4:
        name = str(rng.choice(("color", "shape", "pattern")))
        attributes = {name: getattr((_one(rng, clip, behaviour) or clip.actors[0]).entity, name)}
    found = matches([actor.entity for actor in clip.doing(behaviour)], attributes)
    name = f"{phrase(attributes, many=True)} {verb}"
    if len(found) > MAX_COUNT:
        return None
    return Question(f"How many {name}?", str(len(found)), "counting", (mention(clip.scene, name, found),))


def ask_blinking(rng: np.random.Generator, clip: Clip) -> Question | None:
    """How often an object blinks, 0 to 3; some ask of one that does not."""
    actor = _one(rng, clip, *(("still", "moving") if rng.random() < 0.15 else ("blinking",)))
    name = _named(rng, clip, actor)
    return name and Question(f"How many times does the {name.phrase} blink?", str(actor.blinks), "blinking", (name,))


ASKERS: dict[str, Callable[[np.random.Generator, Clip], Question | None]] = {
    "attribute": ask_attribute,
    "motion": ask_motion,
    "order": ask_order,
    "counting": ask_counting,
    "blinking": ask_blinking,
}
TYPES = tuple(ASKERS)
MIX = {"attribute": 0.12, "motion": 0.28, "order": 0.24, "counting": 0.18, "blinking": 0.18}


def ask(rng: np.random.Generator, clip: Clip, count: int) -> list[Question]:
    """Up to ``count`` different questions about a clip, their types drawn from ``MIX`` as far as the clip has them."""
    asked: dict[str, Question] = {}
    for name in rng.choice(list(MIX), 3 * count + 6, p=list(MIX.values())):
        question = ASKERS[str(name)](rng, clip)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())


def clip_questions(split: str, count: int, per_clip: int = 8, seed: int = 0) -> Iterator[tuple[Clip, list[Question]]]:
    """Full-size clips of a split with their questions; every ``seed`` has ten thousand clips of its own."""
    if not 0 <= count <= 10_000:
        raise ValueError(f"count: got {count}, expected 0 to 10000, the clips of one seed")
    for index in range(count):
        clip = generate_clip(scenes.scene_seed(split, 10_000 * seed + index))
        yield clip, ask(np.random.default_rng((clip.seed, seed, 8)), clip, per_clip)
